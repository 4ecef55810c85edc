"""Checkpoints: opened and checked, changed by surgery, written."""
