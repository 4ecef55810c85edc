"""A random order: looks at no data, and is the floor that every other scorer has to beat."""

import torch

from layer_surgery.scoring.context import SCORERS, Ranking, ScoringContext


@SCORERS.add("random", parts=True)
def random_order(context: ScoringContext) -> Ranking:
    """Return uniform random values from the user's seed."""
    generator = torch.Generator().manual_seed(context.seed)
    values = torch.rand(context.layer_count, generator=generator, dtype=torch.float64).tolist()
    return Ranking("random in [0, 1)", values)
