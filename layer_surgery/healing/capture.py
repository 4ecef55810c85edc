"""What the original says of the text, taken once by walks over it: one layer in memory, as many windows as may wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.outputs import HiddenAnswers, TeacherAnswers, token_outputs
from layer_surgery.walk.boundaries import Boundary, BoundaryStore
from layer_surgery.walk.losses import targets
from layer_surgery.walk.observer import Observer
from layer_surgery.walk.rehearsal import Rehearsal
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import LOGITS_AT_A_TIME, Walk, WalkSettings

Reduce = Callable[[Tensor, int], Sequence[Tensor]]
"""From the outputs [n, V] of the head for the items of a window, and its number, to what is kept of them: tensors that
are joined along their first dimension."""


class KeptStore(Protocol):
    """Keeps something of what layers of the original give."""

    def observer(self, first: int) -> Observer:
        """Return an observer for a walk over windows from number `first` on."""
        ...


def asked(
    teacher: StreamedModel,
    tokens: PackedTokens,
    settings: WalkSettings,
    windows: slice,
    reduce: Reduce | None = None,
    stores: Sequence[KeptStore] = (),
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield, for consecutive windows of `tokens`, how many they are, and what is kept of the head's outputs for them.

    Items are tokens with loss, or the window itself ([1, L]) where there is one answer for each. All processes get what
    each of them has found for its own micro-batches.

    The model is walked over as many windows at a time as fit into the memory for boundaries.

    Args:
        reduce: makes of a window's outputs what is kept; None: only `stores` keep something.
        stores: where what layers give is kept too, if a loss looks at it.
    """
    window_bytes = tokens.sequence_length * teacher.hidden_size * teacher.dtype.itemsize
    together = max(settings.batch_size, settings.boundary_memory_bytes // (2 * window_bytes))
    for start in range(windows.start, windows.stop, together):
        part = slice(start, min(start + together, windows.stop))
        observers = [store.observer(start) for store in stores]
        with Walk(teacher, tokens.select(part), settings) as walk:
            last = walk.forward(range(teacher.layer_count), keep=False, observers=observers)
            numbers = walk.share.windows.tolist()
            sizes = [rows.stop - rows.start for rows in walk.all_tokens.batches(settings.batch_size)]
            for round_, (rows, present) in enumerate(walk.share.rounds):
                found: list[Tensor] = []
                if rows is not None and reduce is not None:
                    outputs = zip(range(rows.start, rows.stop), _outputs(walk, last, rows), strict=True)
                    kept = [reduce(each, start + numbers[row]) for row, each in outputs]
                    found = [torch.cat(parts) for parts in zip(*kept, strict=True)]
                for source in range(present):
                    own = source == parallel.group().rank
                    count = parallel.gather(len(found))[source]
                    yield (
                        sizes[round_ * parallel.group().world + source],
                        [
                            parallel.broadcast(found[place] if own else None, source, torch.device("cpu"))
                            for place in range(count)
                        ],
                    )


def _outputs(walk: Walk, last: Boundary, rows: slice) -> Iterator[Tensor]:
    """Yield the outputs [n, V] for the items of each window of a micro-batch."""
    if walk.tokens.objective.of_sequences:
        yield from _answers(walk, last.read(rows), rows)
        return
    carries = targets(walk.tokens, rows) != NO_LABEL
    for row in range(rows.start, rows.stop):
        yield _logits(walk, last.read(slice(row, row + 1))[0, carries[row - rows.start]])


@torch.no_grad()
def _answers(walk: Walk, hidden: Tensor, rows: slice) -> list[Tensor]:
    """Return the outputs [1, L], float32 or better, for each window of states [B, S, D]."""
    outputs = walk.rehearsal.head(hidden, walk.tokens.inputs(rows))
    return list(torch.split(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), 1))


@torch.no_grad()
def _logits(walk: Walk, hidden: Tensor) -> Tensor:
    """Return the logits [n, V], float32 or better, of states [n, D]; chunk by chunk, as long sequences make them."""
    step = max(1, LOGITS_AT_A_TIME // walk.model.vocabulary_size)
    return torch.cat([token_outputs(walk.rehearsal, piece) for piece in torch.split(hidden, step)])


class DenseTeacher:
    """All that the original says of the windows: its last states in bfloat16, from which its head makes logits again.

    For losses that look at the whole distribution. The original's embeddings and head stay in memory.
    """

    def __init__(self, teacher: StreamedModel, tokens: PackedTokens, states: TeacherStatesStore) -> None:
        """Read the states after the last layer from the last slot of `states`."""
        self._rehearsal, self._tokens, self._states = Rehearsal(teacher), tokens, states
        self._dtype = teacher.dtype

    def read(self, windows: Tensor) -> TeacherAnswers:
        """Return what it says of the tokens with loss of some windows [B] int64."""
        carries = targets(self._tokens, windows.cpu()) != NO_LABEL
        hidden = self._states.read(-1, windows)
        hidden = hidden[carries.to(hidden.device)].to(self._dtype)
        return HiddenAnswers(hidden, partial(token_outputs, self._rehearsal), self._tokens.objective)


class TeacherStatesStore:
    """Hidden states after some layers of the original in every window, in bfloat16, in memory or on disk."""

    def __init__(self, store: BoundaryStore, layers: Sequence[int]) -> None:
        """Keep the states after `layers`; the store has a slot [windows, S, D] for each, the first for the first."""
        self._store, self._slots = store, {layer: slot for slot, layer in enumerate(layers)}

    def read(self, pair: int, windows: Tensor) -> Tensor:
        """Return the states [B, S, D] of some windows [B] after the layer of a pair; -1 is the last."""
        slot = pair % len(self._slots)
        rows = [self._store.read(slot, slice(window, window + 1)) for window in windows.tolist()]
        return torch.cat(rows)

    def observer(self, first: int) -> Observer:
        """Return an observer for a walk over windows from number `first` on."""
        return KeptObserver(self._store, self._slots, first)


class KeptObserver(Observer):
    """Each process keeps what layers give of all windows: any of them may be in its part of a step."""

    def __init__(self, store: BoundaryStore, slots: dict[int, int], first: int) -> None:
        self._store, self._slots, self._first = store, slots, first
        self._next, self._index = first, 0
        self._own: Tensor | None = None  # of the micro-batch at hand

    def kept(self, after: Tensor) -> Tensor:
        """Return what is kept of a micro-batch, whose states [B, S, D] after the layer are given."""
        return after

    def watching(self, index: int, layer: nn.Module) -> AbstractContextManager[None]:
        self._next, self._index = self._first, index
        return nullcontext()

    def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
        self._own = self.kept(after).to(self._store.dtype) if index in self._slots else None

    def end_round(self, present: int) -> None:
        if self._index not in self._slots:
            return
        for source in range(present):
            own = self._own if source == parallel.group().rank else None
            states = parallel.broadcast(own, source, self._store.device)
            self._store.write(self._slots[self._index], slice(self._next, self._next + len(states)), states)
            self._next += len(states)
