"""The command line: the options are derived from `layer_surgery.config`, the work is that of `layer_surgery.api`."""
