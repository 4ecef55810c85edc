"""Scorers that look at no data: the floor that every other scorer has to beat."""

from __future__ import annotations

import torch

from layer_surgery.records import LayerScores
from layer_surgery.scoring.context import SCORERS, ScoringContext, least_first


@SCORERS.add("random", summary="a seeded random order", parts=True)
def random(context: ScoringContext) -> LayerScores:
    """Return uniform random values from the user's seed."""
    values = torch.rand(context.layer_count, generator=context.generator(), dtype=torch.float64).tolist()
    return LayerScores(
        scorer="random", source="", quantity="random in [0, 1)", values=values, removal_order=least_first(values)
    )


@SCORERS.add("last", summary="the deepest layers but the final one", parts=True)
def last(context: ScoringContext) -> LayerScores:
    """Return the distance from the end; the final layer, which prepares the output, goes last of all."""
    count = context.layer_count
    values = [float(count - index) for index in range(count - 1)] + [float(count + 1)]
    return LayerScores(
        scorer="last", source="", quantity="layers from the end", values=values, removal_order=least_first(values)
    )
