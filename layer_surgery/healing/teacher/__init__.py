"""Answers of the teacher, captured once and kept on disk in few bytes a token."""
