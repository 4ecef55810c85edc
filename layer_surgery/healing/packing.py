"""Short windows side by side in one row, none of which sees another: by position ids that begin anew at each.

transformers makes the mask of such a row from the position ids (`find_packed_sequence_indices` in masking_utils.py),
but only for architectures whose attention asks for it: one with learned or relative positions of its own, or one that
passes a state from token to token, would mix windows. So a model is asked for its states on the same windows in both
forms before it is trained in this one (`packs`).
Shapes: B windows of at most L tokens, P rows of R tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.body import Body

#: How far the states of the two forms may differ, relative to their norm, by the dtype.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
_COARSE = 0.02  # of 16 bits


@dataclass(frozen=True)
class Packing:
    """Where each window of a batch stands."""

    rows: Tensor  #: [B] int64
    starts: Tensor  #: [B] int64, the place of its first token in the row.
    lengths: Tensor  #: [B] int64
    count: int  #: P
    length: int  #: R

    @classmethod
    def of(cls, lengths: Sequence[int] | Tensor) -> Packing:
        """Return places for windows of these lengths, in as few rows as first fit finds for the longest first.

        Rows are as long as the longest window: attention costs more than in proportion to them.
        """
        sizes = [int(size) for size in lengths]
        rows, starts, count = _first_fit(sizes)
        return cls(torch.tensor(rows), torch.tensor(starts), torch.tensor(sizes), count, max(sizes))

    @property
    def saves(self) -> bool:
        """Whether there are fewer rows than windows."""
        return self.count < len(self.lengths)

    def packed(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs [P, R] of a model, with position ids, of those of the windows [B, L]."""
        device = given["input_ids"].device
        places, windows, tokens = (each.to(device) for each in self._tokens())
        together = {name: tensor.new_zeros(self.count * self.length) for name, tensor in given.items()}
        for name, tensor in given.items():
            together[name][places] = tensor[windows, tokens]
        # What is left at the end of a row is a window of its own too.
        positions = torch.zeros(self.count * self.length, dtype=torch.int64, device=device)
        used = torch.zeros(self.count, dtype=torch.int64).scatter_add_(0, self.rows, self.lengths)
        behind = torch.arange(self.length)[None] - used[:, None]
        positions[(behind >= 0).flatten().to(device)] = behind[behind >= 0].to(device)
        positions[places] = tokens
        return {
            name: flat.view(self.count, self.length) for name, flat in (together | {"position_ids": positions}).items()
        }

    def apart(self, states: Tensor) -> Tensor:
        """Return what is known of each token [P, R, ...] by window [B, L, ...]; padding has that of some token."""
        index = (self.rows * self.length + self.starts)[:, None] + torch.arange(self.length)
        index = index.clamp_max(self.count * self.length - 1).to(states.device)
        return states.flatten(0, 1)[index]

    def _tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for each token that is no padding, its place in the rows, its window, and its place there."""
        windows = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        before = self.lengths.cumsum(0) - self.lengths
        tokens = torch.arange(len(windows)) - before[windows]
        return (self.rows * self.length + self.starts)[windows] + tokens, windows, tokens


@dataclass(frozen=True)
class Batch:
    """The windows [B, L] of a micro-batch, as models are run on them."""

    given: Mapping[str, Tensor]  #: What a model is called with, by window.
    labels: Tensor
    packing: Packing | None = None  #: Where windows stand in rows that they share.

    @cached_property
    def run(self) -> Mapping[str, Tensor]:
        """What a model is called with, by row."""
        return self.given if self.packing is None else self.packing.packed(self.given)

    def apart(self, states: Tensor) -> Tensor:
        """Return what is known of each token of the rows by window."""
        return states if self.packing is None else self.packing.apart(states)

    @property
    def places(self) -> list[tuple[int, slice]]:
        """Row of each window, and its tokens there."""
        count, length = self.given["input_ids"].shape
        if self.packing is None:
            return [(row, slice(0, length)) for row in range(count)]
        places = zip(
            self.packing.rows.tolist(), self.packing.starts.tolist(), self.packing.lengths.tolist(), strict=True
        )
        return [(row, slice(start, start + size)) for row, start, size in places]


def _first_fit(sizes: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Return the row and the place in it of things of these sizes, and the number of rows, as long as the largest."""
    length, taken = max(sizes), list[int]()
    rows, starts = [0] * len(sizes), [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda each: -sizes[each]):
        row = next((row for row, end in enumerate(taken) if end + sizes[number] <= length), len(taken))
        if row == len(taken):
            taken.append(0)
        rows[number], starts[number] = row, taken[row]
        taken[row] += sizes[number]
    return rows, starts, len(taken)


def packed_batch_size(lengths: Tensor, share: int, room: int) -> int:
    """Return how many windows may be computed together so that their rows have at most so many tokens.

    Args:
        lengths: [n] of the windows in the order in which they are trained on.
        share: windows of a step that one process has; what is returned divides it.
        room: tokens, padding included.
    """
    sizes = lengths.tolist()

    def fits(count: int) -> bool:
        together = (sizes[start : start + count] for start in range(0, len(sizes), count))
        return all(_first_fit(part)[2] * max(part) <= room for part in together)

    return next((count for count in range(share, 1, -1) if share % count == 0 and fits(count)), 1)


@torch.no_grad()
def packs(body: Body, tokens: PackedTokens) -> bool | None:
    """Return whether a model has the same states on two short windows of these side by side as apart.

    None if there is nothing to pack: no two windows fit into the longest.
    """
    lengths = tokens.valid.sum(dim=1)
    short = (lengths <= int(lengths.max()) // 2).nonzero().flatten()
    chosen = short[lengths[short].argsort(descending=True, stable=True)][:2]
    if tokens.objective.problem != "next_token" or len(chosen) < 2:
        return None
    sizes = lengths[chosen]
    packing = Packing(torch.zeros(2, dtype=torch.int64), sizes.cumsum(0) - sizes, sizes, 1, int(sizes.sum()))
    given = tokens.inputs(chosen)
    try:
        together = packing.apart(body.states(packing.packed(given))[body.last])
    except Exception:  # whatever a model raises that does not take position ids
        return False
    limit = _ROUNDING.get(body.dtype, _COARSE)
    for window, size in enumerate(sizes.tolist()):
        alone = body.states({name: tensor[window : window + 1, :size] for name, tensor in given.items()})[body.last][0]
        # Written so that a state which is not a number is a difference.
        if not float((together[window, :size] - alone).norm()) <= limit * float(alone.norm()):
            return False
    return True
