"""The command line: one file a command, the options derived from `config.py`."""
