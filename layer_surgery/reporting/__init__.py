"""Views of records: tables for the terminal, pages, figures and model cards. Nothing is measured here."""
