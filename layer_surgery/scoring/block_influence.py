"""Block influence: how much a layer turns the hidden state.

Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.scoring.context import SCORERS, Ranking, ScoringContext
from layer_surgery.walk.observer import Observer


class CosineObserver(Observer):
    """Takes the mean of cos(h_l, h_{l+1}) over valid tokens, for every layer it sees."""

    def __init__(self) -> None:
        self.means: dict[int, float] = {}
        self._sums = parallel.Sums()

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        self._sums = parallel.Sums(lambda _name: range(parallel.group().world))
        yield
        total, tokens = self._sums.totals["cosines"].tolist()
        self.means[index] = total / tokens

    def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
        cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
        found = torch.tensor([float(cosine[valid].sum()), float(valid.sum())], dtype=torch.float64)
        self._sums.term("cosines", (2,), found).add_(found)

    def end_round(self, present: int) -> None:
        self._sums.close(present)


@SCORERS.add(
    "block_influence",
    needs_data=True,
)
def block_influence(context: ScoringContext) -> Ranking:
    """Return `BI_l = 1 - E_t cos(h_l, h_{l+1})`; the least influential layers go first."""
    observer = CosineObserver()
    context.walk.forward(context.path, keep=context.keep_boundaries, observers=[observer])
    values = [1.0 - observer.means[index] for index in context.path]
    return Ranking("1 - mean cosine similarity of input and output", values)
