"""Scorers: each ranks the decoder layers by importance. One per file; importing this package registers all."""

from layer_surgery.scoring import angular, baselines, block_influence, fisher, perplexity, taylor
from layer_surgery.scoring.context import SCORERS, Scorer, ScoringContext

__all__ = [
    "SCORERS",
    "Scorer",
    "ScoringContext",
    "angular",
    "baselines",
    "block_influence",
    "fisher",
    "perplexity",
    "taylor",
]
