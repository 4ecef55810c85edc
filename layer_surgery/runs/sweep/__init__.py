"""Many compressions of one model, sharing everything that they have in common, and measured each."""

from layer_surgery.runs.sweep.run import run_sweep
