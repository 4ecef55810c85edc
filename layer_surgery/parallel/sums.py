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
    What a micro-batch adds goes to `term`, under the same names in every round; `close` ends the round. A total is held
    by its owners only.
    """

    def __init__(self, owners_of: Callable[[str], Iterable[int]] = lambda _name: (0,)) -> None:
        self.totals: dict[str, Tensor] = {}
        self._owners_of = owners_of
        self._terms: dict[str, Tensor] = {}  # of the round at hand
        self._known: dict[str, tuple[tuple[int, ...], Tensor]] = {}  # shapes, and an empty tensor of dtype and device

    def term(self, name: str, shape: Sequence[int], like: Tensor, *, whole: bool = False) -> Tensor:
        """Return the tensor to which the micro-batch at hand is to be added, once: in place, in the dtype of `like`.

        With `whole` it may be added to several times, and only what the micro-batch gives in all is added to the sum.
        Alone it is the total itself, which saves the memory of one tensor a name.
        """
        held = self._terms if whole or group().world > 1 else self.totals
        if name not in held:
            held[name] = torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
            self._known[name] = tuple(shape), like.new_empty(0)
        return held[name]

    def close(self, present: int) -> None:
        """End a round: every term goes to the owners of its name, which add them in the order of the ranks."""
        for name, (shape, like) in self._known.items():
            if group().world == 1:
                if name in self._terms:
                    self._add(name, self._terms[name])
                continue
            term = self._terms.get(name)
            if term is None:
                term = like.new_zeros(shape)
            for owner in sorted(set(self._owners_of(name))):
                self._collect(name, term, owner, present)
        self._terms.clear()

    def _collect(self, name: str, own: Tensor, owner: int, present: int) -> None:
        """Send this process's term of the round to the owner, or be the owner."""
        rank = group().rank
        if owner != rank:
            if rank < present:
                exchanged(lambda: _exchange([dist.P2POp(dist.isend, own, owner)]))
            return
        terms = {other: own if other == rank else torch.empty_like(own) for other in range(present)}
        received = [dist.P2POp(dist.irecv, term, other) for other, term in terms.items() if other != rank]
        exchanged(lambda: _exchange(received))
        for term in terms.values():
            self._add(name, term)

    def _add(self, name: str, term: Tensor) -> None:
        if name in self.totals:
            self.totals[name] += term
        else:
            self.totals[name] = term + 0


def _exchange(operations: list[dist.P2POp]) -> None:
    if not operations:
        return
    for work in dist.batch_isend_irecv(operations):
        work.wait()
