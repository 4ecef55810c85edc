"""Extraction of diseases, medications and symptoms from synthetic clinical notes."""
