"""Losses of what is inside both models: hidden states, relations, attention.

Each value is a sum over the items of the windows: a mean over tokens, times the number of items. Where the next token
is predicted, the tokens are those with loss. Elsewhere few have any (masked tokens), or none of its own, so they are
all tokens of a window that are no padding, window by window: then values do not depend on which windows come together.
Shapes: B windows of L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from layer_surgery.data.objective import NO_LABEL
from layer_surgery.healing.attention_maps import Attended, AttentionMaps
from layer_surgery.healing.losses.inputs import StatePair
from layer_surgery.healing.losses.states import Projections
from layer_surgery.healing.mixture import WeightedLoss
from layer_surgery.healing.packing import Batch
from layer_surgery.healing.relations import Relations

Values = Iterator[tuple[WeightedLoss, Tensor]]
"""Losses with their values [], without weights."""


def compared_tokens(batch: Batch) -> Tensor:
    """Return the tokens [B, L] bool that losses inside the models look at."""
    mask = batch.given.get("attention_mask")
    return batch.labels != NO_LABEL if mask is None else mask.bool()


def of_states(
    losses: Sequence[WeightedLoss],
    states: Sequence[tuple[Tensor, Tensor]],
    batch: Batch,
    items: Tensor,
    projections: Projections | None = None,
) -> Values:
    """Yield the losses of hidden states.

    Args:
        states: of student and teacher, each [B, L, D], pair by pair.
        items: [B] of each window.
        projections: of the student's states, for losses that have them projected.
    """
    seen = compared_tokens(batch)
    if "attention_mask" in batch.given:
        parts = [(slice(row, row + 1), int(items[row])) for row in range(len(seen))]
    else:
        parts = [(slice(None), int(seen.sum()))]
    for rows, count in parts:
        if not count:
            continue
        chosen = seen[rows]
        pairs = [
            StatePair(student[rows][chosen], teacher[rows][chosen.to(teacher.device)].to(student), number)
            for number, (student, teacher) in enumerate(states)
        ]
        projected = projections(pairs) if projections is not None else pairs
        for loss in losses:
            if loss.entry.needs == "states":
                yield loss, loss.value(projected if loss.settings.get("projected") else pairs) * count


def of_relations(
    losses: Sequence[WeightedLoss],
    relations: Relations,
    seen: Mapping[str, Tensor],
    batch: Batch,
    windows: Tensor,
    items: Tensor,
) -> Values:
    """Yield the losses of relations; `seen` is what the student's last layer gave, as it was run."""
    for loss in losses:
        if loss.entry.needs == "relations":
            values = relations.values(loss, seen, batch, windows, compared_tokens(batch))
            yield loss, (values * items).sum()


def of_attention(
    losses: Sequence[WeightedLoss],
    maps: AttentionMaps,
    students: Mapping[int, Attended],
    teachers: Mapping[int, Attended],
    batch: Batch,
    items: Tensor,
) -> Values:
    """Yield the losses of attention maps."""
    for loss in losses:
        if loss.entry.needs == "attention":
            values = maps.values(loss, students, teachers, compared_tokens(batch), batch.places)
            yield loss, (torch.where(items > 0, values, torch.zeros_like(values)) * items).sum()
