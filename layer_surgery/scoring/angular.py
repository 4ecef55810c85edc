"""Angular distance across a block of layers, at the last token.

Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers.
"""

import math

import torch
from torch import Tensor

from layer_surgery.scoring.context import SCORERS, Ranking, ScoringContext
from layer_surgery.walk.observer import Observer


class LastTokenObserver(Observer):
    """Keeps the hidden state [D] of each sequence's last valid token at every boundary."""

    def __init__(self) -> None:
        self.states: dict[int, list[Tensor]] = {}

    def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
        # The last valid position; padding, if any, is all on the right.
        last = valid.sum(dim=1) - 1
        rows = torch.arange(before.shape[0], device=before.device)
        if index == 0:
            self.states.setdefault(0, []).append(before[rows, last].double().cpu())
        self.states.setdefault(index + 1, []).append(after[rows, last].double().cpu())

    def at(self, boundary: int) -> Tensor:
        """Return [n, D] float64 for the sequences of this process."""
        return torch.cat(self.states[boundary])


def angular_distance(a: Tensor, b: Tensor) -> float:
    """Return the mean of `arccos(cos(a, b)) / pi` over rows, from 0 (parallel) to 1 (opposite)."""
    cosine = torch.cosine_similarity(a, b, dim=-1).clamp(-1.0, 1.0)
    return float((cosine.arccos() / math.pi).mean())


@SCORERS.add(
    "angular",
    needs_data=True,
    depends_on=("count",),
)
def angular(context: ScoringContext) -> Ranking:
    """Return the distance that each single layer spans; the block of `count` layers that spans least goes."""
    observer = LastTokenObserver()
    context.walk.forward(context.path, keep=context.keep_boundaries, observers=[observer])
    states = [context.walk.rows_of_all(observer.at(boundary)) for boundary in range(context.layer_count + 1)]
    values = [angular_distance(states[index], states[index + 1]) for index in context.path]
    size = context.count or 1
    blocks = [angular_distance(states[s], states[s + size]) for s in range(context.layer_count - size + 1)]
    start = min(range(len(blocks)), key=lambda s: (blocks[s], -s))
    quantity = f"angular distance / pi across one layer; the order is the best block of {size}"
    return Ranking(quantity, values, list(range(start, start + size)))
