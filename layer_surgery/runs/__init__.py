"""Commands as a user starts them: one file for each, and the bench that they share."""
