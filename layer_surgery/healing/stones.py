"""Stepping stones: models whose first layers are the student's and whose others are the original's, for block-wise
logit distillation (https://arxiv.org/abs/2411.01547).

The stream has one width in both models, so a stone needs no layer between the two parts, as the paper's do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layer_surgery.healing.packing import Batch
from layer_surgery.healing.resident import ResidentTeacher


class SteppingStones:
    """The stones between a student and the original beside it, but for the last one, the student itself."""

    def __init__(
        self, teacher: ResidentTeacher, changed: Sequence[int], pairs: Sequence[tuple[int, int]], blocks: int
    ) -> None:
        """Choose where the student is left for the original.

        Args:
            changed: positions in the student of layers that the surgery changed, or before which it removed some.
            pairs: (layer of the student, layer of the original) whose outputs correspond, for all layers in order.
            blocks: how many stones there are at most, the student included; each has about as many changed layers more
                than the one before it.
        """
        self._teacher = teacher
        places = [pairs[position] for position in changed if position < pairs[-1][0]]  # behind the last is its head
        count = min(blocks - 1, len(places))
        self._places = [places[math.ceil((1 + number) * len(changed) / (1 + count)) - 1] for number in range(count)]

    @property
    def positions(self) -> list[int]:
        """The layers of the student whose states they begin with."""
        return [position for position, _ in self._places]

    def states(self, seen: Mapping[int, Tensor], batch: Batch) -> list[Tensor]:
        """Return the states [B, L, D] after the original's last layer of each stone, from the fewest layers of the
        student on; `seen` are the student's states by layer, as they were run."""
        return [self._teacher.rest(seen[position], layer, batch) for position, layer in self._places]

    def outputs(self, states: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs [n, V] of the original's head for states [n, D] of each stone, float32 or better."""
        found = [self._teacher.outputs_of(each) for each in states]
        return [each.to(torch.promote_types(each.dtype, torch.float32)) for each in found]
