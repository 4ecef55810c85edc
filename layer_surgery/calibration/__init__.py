"""Statistics that one walk over the calibration data gives, how layers cost together, and where both are kept."""
