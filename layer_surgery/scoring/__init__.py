"""Scorers: each ranks the decoder layers by importance. One per file; importing this package registers all."""

# In the order in which `--help` lists them.
# isort: off
from layer_surgery.scoring import angular, random_order, last, block_influence, fisher, perplexity, taylor  # noqa: F401

# isort: on
from layer_surgery.scoring.context import SCORERS, Scorer, ScorerEntry, ScoringContext

__all__ = ["SCORERS", "Scorer", "ScorerEntry", "ScoringContext"]
