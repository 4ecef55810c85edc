"""Reporting: tables made from records. Computes nothing new."""
