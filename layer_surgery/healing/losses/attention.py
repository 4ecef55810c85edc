"""Attention compared: its maps, or the relations among queries, keys and values.

Shapes: B sequences, S tokens, H heads; queries come before keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from layer_surgery.errors import UserError
from layer_surgery.healing.losses.inputs import AttentionPair, RelationPair
from layer_surgery.healing.losses.registry import LOSSES, Interval
from layer_surgery.healing.losses.states import mean_over


@LOSSES.add(
    "attention",
    needs="attention",
    teachers=(),
)
def attention_mse(pairs: Sequence[AttentionPair]) -> Tensor:
    """Return the mean of `(a_s - a_t)^2` [] over pairs, heads and the places that a query sees.

    Raises `UserError` where the two have different numbers of heads.
    """
    return mean_over(pairs, _map_error)


def _map_error(pair: AttentionPair) -> Tensor:
    heads = pair.student.shape[1], pair.teacher.shape[1]
    if heads[0] != heads[1]:
        raise UserError(
            f"--loss attention compares head by head, and a layer of the result has {heads[0]} heads where the "
            f"original has {heads[1]}; use --loss relations."
        )
    hidden = ~pair.visible[:, None]
    difference = pair.student.masked_fill(hidden, 0) - pair.teacher.masked_fill(hidden, 0)
    return difference.square().sum() / (pair.visible.sum() * heads[0]).clamp_min(1)


@LOSSES.add(
    "relations",
    needs="relations",
    teachers=(),
    allowed={"heads": Interval(1, whole=True)},
)
def relation_kl(pairs: Sequence[RelationPair], *, heads: float = 4.0) -> Tensor:
    """Return the mean over pairs, relation heads and tokens of KL(softmax(X_t X_t^T / sqrt d) || the student's) [].

    X [S, d] is one relation head: the queries (or keys, or values) of all attention heads side by side are cut anew
    into `heads` parts, so that models with different heads compare. Raises `UserError` if that does not come out even.
    """
    return mean_over(pairs, lambda pair: _relation_divergence(pair, heads))


def _relation_divergence(pair: RelationPair, heads: float) -> Tensor:
    for width in (pair.student.shape[-1], pair.teacher.shape[-1]):
        if width % heads:
            raise UserError(f"--loss relations has heads={heads:g}, which does not divide a width of {width}.")
    student, teacher = (_relations(x, int(heads), pair.visible) for x in (pair.student, pair.teacher))
    hidden = ~pair.visible[:, None]
    divergence = (teacher.exp() * (teacher - student)).masked_fill(hidden, 0).sum(dim=-1)  # [B, H, S]
    tokens = pair.visible.any(dim=-1)  # [B, S]
    return divergence.sum() / (tokens.sum() * int(heads)).clamp_min(1)


def _relations(x: Tensor, heads: int, visible: Tensor) -> Tensor:
    """Return the log of the relations [B, H, S, S] of tokens; in masked places something finite that counts nothing."""
    parts = rearrange(x, "batch token (head width) -> batch head token width", head=heads)
    scores: Tensor = parts @ parts.transpose(-1, -2) / parts.shape[-1] ** 0.5
    return scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min / 2).log_softmax(dim=-1)
