"""Files and directories so that nothing is lost: renamed whole, locked, cleaned up after, read with a limit."""
