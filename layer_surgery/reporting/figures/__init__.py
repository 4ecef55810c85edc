"""Figures of the pages, one file for each subject."""
