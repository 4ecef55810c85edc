"""Alignment of features: where the residual stream points, how it moves from layer to layer, how tokens relate in it.

Shapes: n tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from layer_surgery.healing.losses.inputs import StatePair
from layer_surgery.healing.losses.registry import LOSSES, NOT_NEGATIVE
from layer_surgery.healing.losses.states import hidden_cosine, mean_over, one_minus_cosine


@LOSSES.add(
    "trajectory",
    needs="states",
    teachers=(),
    allowed={"direction": NOT_NEGATIVE, "step": NOT_NEGATIVE},
)
def trajectory(pairs: Sequence[StatePair], *, direction: float = 1.0, step: float = 1.0) -> Tensor:
    """Return `direction` * mean of 1 - cos(h_i) + `step` * mean of 1 - cos(h_{i+1} - h_i) [], h_i at pair i.

    Takes the layer trajectory for a curve: its points, and its derivative by finite differences (Feature dynamics
    distillation, ACL 2025, has both). Where layers were removed the student's step stands for several of the
    teacher's. Raises `ValueError` unless the pairs are in the order of the layers.
    """
    if any(one.position >= other.position for one, other in pairwise(pairs)):
        raise ValueError("pairs must be in the order of the layers")
    total = direction * hidden_cosine(pairs)
    steps = [
        one_minus_cosine(other.student - one.student, other.teacher - one.teacher) for one, other in pairwise(pairs)
    ]
    return total + step * torch.stack(steps).mean() if steps else total


@LOSSES.add(
    "cka",
    needs="states",
    teachers=(),
    across_tokens=True,
)
def centred_kernel_alignment(pairs: Sequence[StatePair]) -> Tensor:
    """Return the mean over pairs of `1 - CKA` [], `CKA = |T^T S|^2 / (|S^T S| |T^T T|)` of centred states [n, D].

    Between 0 and 1; blind to rotations and to scale. With fewer tokens than D it is near 1 for any two models, so give
    it many.
    """
    return mean_over(pairs, lambda pair: 1 - _cka(pair.student, pair.teacher))


def _cka(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (each - each.mean(dim=0) for each in (student, teacher))
    # Scaled first: squares of squares of a stream with outliers leave float32.
    s, t = (each / each.norm().clamp_min(torch.finfo(each.dtype).tiny) for each in (s, t))
    across: Tensor = (t.T @ s).square().sum()
    within: Tensor = (s.T @ s).norm() * (t.T @ t).norm()
    return across / within.clamp_min(torch.finfo(within.dtype).tiny)
