"""Scorers: each ranks the decoder layers by importance. One per file; importing this package registers all."""

# In the order in which `--help` lists them.
# isort: off
from layer_surgery.scoring import angular, random_order, last, block_influence, fisher, perplexity, taylor

# isort: on
from layer_surgery.scoring.context import SCORERS, ScorerEntry, ScoringContext
