"""Which micro-batches of the tokens each process walks over."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layer_surgery import parallel
from layer_surgery.data.tokens import PackedTokens


@dataclass(frozen=True)
class Share:
    """The micro-batches of one process: of every round, the one at the place of its rank."""

    tokens: PackedTokens  #: Their sequences, one after the other: all of them, where there is one process.
    windows: Tensor  #: [n] int64, the numbers of these sequences among all.
    rounds: tuple[tuple[slice | None, int], ...]
    """Of every round, where this process's micro-batch is in `tokens` (None: it has none), and how many have one."""


def share_of(tokens: PackedTokens, batch_size: int) -> Share:
    """Return what this process walks over: so many sequences at a time, in the same micro-batches as one would."""
    group, batches = parallel.group(), [*tokens.batches(batch_size)]
    rounds: list[tuple[slice | None, int]] = []
    windows = list[int]()
    for start in range(0, len(batches), group.world):
        present = batches[start : start + group.world]
        rows = None
        if group.rank < len(present):
            batch = present[group.rank]
            rows = slice(len(windows), len(windows) + batch.stop - batch.start)
            windows += range(batch.start, batch.stop)
        rounds.append((rows, len(present)))
    numbers = torch.tensor(windows, dtype=torch.int64)
    if group.world > 1:
        parts = ("token_ids", "loss_mask", "valid", "labels", "segments")
        own = {name: found[numbers] for name in parts if (found := getattr(tokens, name)) is not None}
        tokens = replace(tokens, **own)
    return Share(tokens, numbers, tuple(rounds))
