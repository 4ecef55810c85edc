"""Sums over micro-batches that are the same, bit for bit, for any number of processes.

Sums of floating-point numbers depend on the order of addition. So what a micro-batch adds to a sum, its term, is formed
by itself, and terms are added in the order of the micro-batches, wherever they come from. A tree of sums would send
less, but either its bits would depend on the number of processes, or each would have to hold a sum for every level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from layer_surgery.parallel.group import exchanged, group


class Sums:
    """Tensors by name, each the sum over the micro-batches of all processes, in the order of the micro-batches.

    Processes work in rounds: in each, the first `present` of them have a micro-batch, in the order of their ranks.
    What a micro-batch adds goes to `term`; `close` ends the round. A total is held by its owners only.
    """

    def __init__(self, owners_of: Callable[[str], Iterable[int]] = lambda _name: (0,)) -> None:
        self.totals: dict[str, Tensor] = {}
        self._owners_of = owners_of
        self._terms: dict[str, Tensor] = {}  # of the round at hand
        self._known: dict[str, Tensor] = {}  # like the terms, without their data

    def term(self, name: str, shape: Sequence[int], like: Tensor, *, whole: bool = False) -> Tensor:
        """Return the tensor to which the micro-batch at hand is to be added, once: in place, in the dtype of `like`.

        With `whole` it may be added to several times, and only what the micro-batch gives in all is added to the sum.
        Alone it is the total itself, which saves the memory of one tensor a name.
        """
        held = self._terms if whole or group().world > 1 else self.totals
        if name not in held:
            held[name] = torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
            self._known[name] = held[name].to("meta")
        return held[name]

    def close(self, present: int) -> None:
        """End a round: every term goes to the owners of its name, which add them in the order of the ranks."""
        if group().world == 1:
            for name, term in self._terms.items():
                self._add(name, term)
        else:
            for name, like in self._known.items():
                for owner in sorted(set(self._owners_of(name))):
                    self._collect(name, like, owner, present)
        self._terms.clear()

    def _collect(self, name: str, like: Tensor, owner: int, present: int) -> None:
        term = self._terms.get(name) if group().rank < present else None
        if owner != group().rank:
            if term is not None:
                exchanged(lambda: _exchange([dist.P2POp(dist.isend, term, owner)]))
            return
        device = self._device(name)
        terms = {
            rank: torch.empty(like.shape, dtype=like.dtype, device=device)
            for rank in range(present)
            if rank != group().rank
        }
        if terms:
            exchanged(lambda: _exchange([dist.P2POp(dist.irecv, each, rank) for rank, each in terms.items()]))
        if term is not None:
            terms[group().rank] = term
        for rank in sorted(terms):
            self._add(name, terms[rank])

    def _device(self, name: str) -> torch.device:
        held = self._terms.get(name, self.totals.get(name))
        assert held is not None, "the first round has a micro-batch for every process"
        return held.device

    def _add(self, name: str, term: Tensor) -> None:
        if name in self.totals:
            self.totals[name] += term
        else:
            self.totals[name] = term + 0


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()
