"""Scorers: each ranks the decoder layers by importance. One per file; importing this package registers all."""

from layer_surgery.scoring import angular, block_influence, fisher, last, perplexity, random_order, taylor
from layer_surgery.scoring.context import SCORERS, ScorerEntry, ScoringContext, check_linears
