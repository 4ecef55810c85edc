"""Scorers: each ranks the decoder layers by importance. One per file; importing this package registers all."""

# In the order in which `--help` lists them.
from layer_surgery.scoring import angular, random_order, last, block_influence, fisher, perplexity, taylor  # isort: skip
from layer_surgery.scoring.context import SCORERS, Scorer, ScorerEntry, ScoringContext

__all__ = [
    "SCORERS",
    "Scorer",
    "ScorerEntry",
    "ScoringContext",
    "angular",
    "block_influence",
    "fisher",
    "last",
    "perplexity",
    "random_order",
    "taylor",
]
