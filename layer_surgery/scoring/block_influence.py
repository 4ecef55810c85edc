"""Block influence: how much a layer turns the hidden state.

Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect.
"""

import torch
from torch import Tensor

from layer_surgery.scoring.context import SCORERS, Ranking, ScoringContext
from layer_surgery.walk.walk import Observer


class CosineObserver(Observer):
    """Sums cos(h_l, h_{l+1}) over valid tokens, for every layer it sees."""

    def __init__(self) -> None:
        self.sums: dict[int, float] = {}
        self.tokens: dict[int, int] = {}

    def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
        cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
        self.sums[index] = self.sums.get(index, 0.0) + float(cosine[valid].sum())
        self.tokens[index] = self.tokens.get(index, 0) + int(valid.sum())


@SCORERS.add(
    "block_influence",
    needs_data=True,
)
def block_influence(context: ScoringContext) -> Ranking:
    """Return `BI_l = 1 - E_t cos(h_l, h_{l+1})`; the least influential layers go first."""
    observer = CosineObserver()
    context.walk.forward(context.path, keep=context.keep_boundaries, observers=[observer])
    values = [1.0 - observer.sums[index] / observer.tokens[index] for index in context.path]
    return Ranking("1 - mean cosine similarity of input and output", values)
