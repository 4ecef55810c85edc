"""What the original says of the text, taken once by walks over it: one layer in memory, as many windows as may wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.losses.inputs import TeacherLogits
from layer_surgery.walk.boundaries import BoundaryStore
from layer_surgery.walk.losses import next_tokens
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
    """Yield, for each of some windows of `tokens` in their order, the logits [n, V] of its tokens with loss.

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
                carries = next_tokens(walk.tokens, rows) != NO_LABEL
                for row in range(rows.start, rows.stop):
                    hidden = last.read(slice(row, row + 1))[:, carries[row - rows.start]]
                    yield _logits(walk, hidden)


@torch.no_grad()
def _logits(walk: Walk, hidden: Tensor) -> Tensor:
    """Return the logits [n, V], float32 or better, of states [1, n, D]; chunk by chunk, as long sequences make them."""
    step = max(1, LOGITS_AT_A_TIME // walk.model.vocabulary_size)
    logits = torch.cat([walk.rehearsal.head(piece)[0] for piece in torch.split(hidden, step, dim=1)])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
        carries = next_tokens(self._tokens, windows) != NO_LABEL
        hidden = self._states.read(-1, windows)[carries].to(self._dtype)
        logits = self._rehearsal.head(hidden[None])[0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return TeacherLogits(log_probs=logits.to(wide).log_softmax(dim=-1))


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
