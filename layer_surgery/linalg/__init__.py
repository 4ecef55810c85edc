"""Pure linear algebra: torch only."""
