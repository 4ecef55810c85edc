"""Figures of the page, one file for each kind."""
