"""Hidden states compared at each pair of layers. Shapes: n tokens, D hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from layer_surgery.healing.losses.inputs import StatePair
from layer_surgery.healing.losses.registry import LOSSES, Arranged, Interval

P = TypeVar("P")


#: Whether the student's states go through a linear map first (`Projections`).
PROJECTED = {"projected": Arranged(0.0, Interval(0, 1, whole=True))}


@LOSSES.add(
    "hidden",
    needs="states",
    teachers=(),
    arranged=PROJECTED,
)
def hidden_mse(pairs: Sequence[StatePair]) -> Tensor:
    """Return the mean of `(h_s - h_t)^2` [] over pairs, tokens and D, in squared units of the stream."""
    return mean_over(pairs, lambda pair: (pair.student - pair.teacher).square().mean())


@LOSSES.add(
    "cosine",
    needs="states",
    teachers=(),
    arranged=PROJECTED,
)
def hidden_cosine(pairs: Sequence[StatePair]) -> Tensor:
    """Return the mean of `1 - cos(h_s, h_t)` [] over pairs and tokens."""
    return mean_over(pairs, lambda pair: one_minus_cosine(pair.student, pair.teacher))


@LOSSES.add(
    "local",
    needs="states",
    teachers=(),
)
def normalised_mse(pairs: Sequence[StatePair]) -> Tensor:
    """Return the mean over pairs of `MSE(o_s, o_t) / MSE(0, o_t)` []: 1 for a block that gives nothing.

    For training block by block, each pair's student is given the teacher's own inputs.
    """
    return mean_over(
        pairs, lambda pair: (pair.student - pair.teacher).square().mean() / _not_zero(pair.teacher.square().mean())
    )


class Projections(nn.Module):
    """A linear map of the student's states for each pair of layers, trained with it and then thrown away: FitNets'
    regressor (https://arxiv.org/abs/1412.6550).

    Surgery leaves the width of the stream alone, so a map is not needed to compare; it lets the student keep what it
    knows in another basis. It begins as the identity.
    """

    def __init__(self, width: int, positions: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        """Make maps [width, width] for pairs at these positions."""
        super().__init__()
        maps = {str(each): nn.Linear(width, width, bias=False, dtype=dtype, device=device) for each in positions}
        self.maps = nn.ModuleDict(maps)
        for linear in maps.values():
            nn.init.eye_(linear.weight)

    def forward(self, pairs: Sequence[StatePair]) -> list[StatePair]:
        """Return the pairs with the student's states projected."""
        return [StatePair(self.maps[str(each.position)](each.student), each.teacher, each.position) for each in pairs]


def mean_over(pairs: Sequence[P], value: Callable[[P], Tensor]) -> Tensor:
    """Return the mean of a value [] over pairs. Raises `ValueError` if there are none."""
    if not pairs:
        raise ValueError("there is no pair to compare")
    return torch.stack([value(pair) for pair in pairs]).mean()


def one_minus_cosine(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean of `1 - cos` [] of rows [n, D]."""
    return (1 - torch.cosine_similarity(one, other, dim=-1)).mean()


def _not_zero(value: Tensor) -> Tensor:
    return value.clamp_min(torch.finfo(value.dtype).tiny)
