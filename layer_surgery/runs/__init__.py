"""What a user starts: one file for each command, and the bench that they share."""
