"""Vectors of texts as plain tensors: what a student's are compared with, and how far they are. Knows torch only."""
