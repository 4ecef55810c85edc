"""What the original says of the text, taken once by walks over it: one layer in memory, as many windows as may wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.losses.inputs import TeacherLogits
from layer_surgery.healing.outputs import token_outputs
from layer_surgery.walk.boundaries import BoundaryStore
from layer_surgery.walk.losses import targets
from layer_surgery.walk.rehearsal import Rehearsal
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import LOGITS_AT_A_TIME, Observer, Walk, WalkSettings


def teacher_logits(
    teacher: StreamedModel,
    tokens: PackedTokens,
    settings: WalkSettings,
    windows: slice,
    states: TeacherStatesStore | None = None,
) -> Iterator[Tensor]:
    """Yield, for each of some windows of `tokens` in their order, the outputs [n, V] of the head for its items.

    Items are tokens with loss, or the window itself ([1, L]) where there is one answer for each.

    The model is walked over as many windows at a time as fit into the memory for boundaries.

    Args:
        states: where hidden states are kept too, if a loss looks at them.
    """
    window_bytes = tokens.sequence_length * teacher.hidden_size * teacher.dtype.itemsize
    together = max(settings.batch_size, settings.boundary_memory_bytes // (2 * window_bytes))
    for start in range(windows.start, windows.stop, together):
        part = slice(start, min(start + together, windows.stop))
        observers = [states.observer(start)] if states is not None else []
        with Walk(teacher, tokens.select(part), settings) as walk:
            last = walk.forward(range(teacher.layer_count), keep=False, observers=observers)
            for rows in walk.batches():
                if tokens.objective.of_sequences:
                    yield from _answers(walk, last.read(rows), rows)
                    continue
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

    @torch.no_grad()
    def read(self, windows: Tensor) -> TeacherLogits:
        """Return the log-probabilities of the tokens with loss of some windows [B] int64."""
        carries = targets(self._tokens, windows.cpu()) != NO_LABEL
        hidden = self._states.read(-1, windows)
        hidden = hidden[carries.to(hidden.device)].to(self._dtype)
        return TeacherLogits(log_probs=token_outputs(self._rehearsal, hidden).log_softmax(dim=-1))


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
        return _StatesObserver(self._store, self._slots, first)


class _StatesObserver(Observer):
    def __init__(self, store: BoundaryStore, slots: dict[int, int], first: int) -> None:
        self._store, self._slots, self._first = store, slots, first
        self._next = first

    def watching(self, index: int, layer: nn.Module) -> AbstractContextManager[None]:
        self._next = self._first
        return nullcontext()

    def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
        if index in self._slots:
            rows = slice(self._next, self._next + len(after))
            self._store.write(self._slots[index], rows, after.to(self._store.dtype))
        self._next += len(after)
