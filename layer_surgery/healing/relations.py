"""What the loss `relations` compares: queries, keys and values of the last layer of both models.

The original's are kept by the walk that asks it, the student's are seen as it runs. Shapes: B windows of S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from layer_surgery.checkpoint.attention import QueriesKeysValues, queries_keys_values
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.errors import UserError
from layer_surgery.healing.capture import KeptObserver
from layer_surgery.healing.losses.inputs import RelationPair
from layer_surgery.healing.mixture import WeightedLoss
from layer_surgery.healing.packing import Batch
from layer_surgery.healing.sources import TeacherProjections
from layer_surgery.walk.boundaries import BoundaryStore
from layer_surgery.walk.observer import Observer


def last_attention(model: Checkpoint) -> QueriesKeysValues:
    """Return where the last layer has its queries, keys and values; raises `CheckpointError` if it has none such."""
    return queries_keys_values(model, model.layer_count - 1)


def check_relations(losses: tuple[WeightedLoss, ...], model: Checkpoint) -> None:
    """Raise `UserError` if a loss compares relations that the last layer of a model does not have."""
    for loss in losses:
        if loss.entry.needs != "relations":
            continue
        heads, widths = int(loss.settings["heads"]), last_attention(model).widths
        odd = next((width for width in widths if width % heads), None)
        if odd is not None:
            divided = ", ".join(map(str, sorted(set(widths))))
            raise UserError(
                f"--loss {loss.name} has heads={heads}, which does not divide {odd}, a width of queries, keys or "
                f"values in the last layer of {model.name}; take a divisor of {divided}."
            )


class TeacherAttentionStore:
    """Queries, keys and values of the original's last layer in every window, in memory or on disk."""

    def __init__(self, store: BoundaryStore, place: QueriesKeysValues, last: int) -> None:
        """Keep them side by side in a slot [windows, S, sum of the widths] of the store.

        Args:
            place: where the layer has them.
            last: number of the layer.
        """
        self._store, self._place, self._last = store, place, last

    def read(self, windows: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each [B, S, its width], of some windows [B] int64."""
        rows = [self._store.read(0, slice(window, window + 1)) for window in windows.tolist()]
        return self._place.split(torch.cat(rows))

    def observer(self, first: int) -> Observer:
        """Return an observer for a walk over windows from number `first` on."""
        return _AttentionObserver(self._store, self._place, self._last, first)


class _AttentionObserver(KeptObserver):
    def __init__(self, store: BoundaryStore, place: QueriesKeysValues, last: int, first: int) -> None:
        super().__init__(store, {last: 0}, first)
        self._place, self._last = place, last
        self._seen: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        with super().watching(index, layer), ExitStack() as stack:
            if index == self._last:
                self._seen = stack.enter_context(self._place.seen(layer))
            yield

    def kept(self, after: Tensor) -> Tensor:
        return self._place.joined(self._seen, after.shape[:2])


class Relations:
    """Both sides of the loss for one student."""

    def __init__(self, student: Checkpoint, teacher: TeacherProjections) -> None:
        """Compare the last layers of a student and its teacher."""
        self._place, self._teacher = last_attention(student), teacher
        self._causal = not student.encoder

    def seen(self, last: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        """Within the block, what `values` needs of the student's last layer is put into what is yielded."""
        return self._place.seen(last)

    def values(
        self, loss: WeightedLoss, seen: Mapping[str, Tensor], batch: Batch, windows: Tensor, carries: Tensor
    ) -> Tensor:
        """Return the loss of each window [B], a mean over its tokens.

        One window at a time, whose relations are computed again on the way back: there are never more than those of
        one, heads x S x S for each of queries, keys and values.

        Args:
            seen: what `seen` has yielded.
            windows: [B] int64, their numbers in the teacher's store.
            carries: [B, S] bool, the tokens that are related to others.
        """
        mask = batch.given.get("attention_mask")  # without one, padding is at the end, and no token sees it
        visible = carries[:, :, None] if mask is None else carries[:, :, None] & mask[:, None, :].bool()
        visible = visible.expand(-1, -1, carries.shape[1])
        if self._causal:
            visible = visible.tril()
        joined = self._place.joined(seen, batch.run["input_ids"].shape)
        students = self._place.split(batch.apart(joined))
        teachers = [each[:, : carries.shape[1]].to(carries.device) for each in self._teacher.read(windows)]
        of_window = partial(_of_window, loss)
        found = [
            recomputed(
                of_window,
                visible[row : row + 1],
                *(each[row : row + 1] for each in (*students, *teachers)),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for row in range(len(carries))
        ]
        return torch.stack(found)


def _of_window(loss: WeightedLoss, visible: Tensor, *both: Tensor) -> Tensor:
    """Return the loss [] of one window in float32 or better.

    Args:
        visible: [1, S, S] bool.
        both: queries, keys and values of the student, then those of the teacher, each [1, S, width].
    """
    dtype = torch.promote_types(both[0].dtype, torch.float32)
    with torch.autocast(visible.device.type, enabled=False):
        students, teachers = both[:3], both[3:]
        return loss.value(
            [
                RelationPair(student.to(dtype), teacher.to(dtype), visible)
                for student, teacher in zip(students, teachers, strict=True)
            ]
        )
