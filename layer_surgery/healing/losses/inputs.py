"""Inputs of the losses: what teacher and student say of some tokens, and the states that they pass on the way.

Shapes: n tokens, V vocabulary, k entries of a sparse record, B sequences of S tokens, D hidden, H heads, m texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

TeacherKind = Literal["dense", "top_k", "sampled"]
"""How much of a teacher's distribution is known: all of it; its largest probabilities and the mass of the rest; or
frequencies in a sample drawn from it."""


@dataclass(frozen=True)
class TeacherLogits:
    """What the teacher says of n tokens. Carries no graph."""

    log_probs: Tensor  #: [n, V] float32 (or better) if `ids` is None, else [n, k].
    ids: Tensor | None = None  #: [n, k] int64, no id twice in a row; rows are padded with id -1 and log-prob -inf.
    tail: Tensor | None = None
    """[n] float32 log of the mass outside `ids`. None beside `ids`: the entries are the frequencies in a sample."""
    temperature: float = 1.0  #: By which the teacher's logits were divided.

    @property
    def kind(self) -> TeacherKind:
        if self.ids is None:
            return "dense"
        return "sampled" if self.tail is None else "top_k"

    def rows(self, rows: slice) -> TeacherLogits:
        """Return what it says of some of the tokens."""
        return TeacherLogits(
            log_probs=self.log_probs[rows],
            ids=None if self.ids is None else self.ids[rows],
            tail=None if self.tail is None else self.tail[rows],
            temperature=self.temperature,
        )


@dataclass(frozen=True)
class TokenLogits:
    """One chunk of n tokens that carry loss."""

    student: Tensor  #: [n, V] logits, float32 or better, with graph.
    teacher: TeacherLogits | None  #: None for losses that look at labels only.
    labels: Tensor  #: [n] int64 in [0, V).


@dataclass(frozen=True)
class StatePair:
    """Hidden states of the same n tokens after one layer of the student and after the layer of the teacher that it
    stands for."""

    student: Tensor  #: [n, D], with graph.
    teacher: Tensor  #: [n, D], detached.
    position: int  #: 0.. from the embedding's side.


@dataclass(frozen=True)
class VectorPair:
    """Embeddings of the same m texts, of any length other than 0; their numbers of dimensions may differ."""

    student: Tensor  #: [m, D], float32 or better, with graph.
    teacher: Tensor  #: [m, T], of the same dtype, detached.


@dataclass(frozen=True)
class AttentionPair:
    """Attention scores (before the softmax, or what it gives) of one layer of each model."""

    student: Tensor  #: [B, H, S, S] (queries, keys), with graph.
    teacher: Tensor  #: [B, H, S, S], detached.
    visible: Tensor  #: [B, S, S] bool: which keys a query sees; False in the rows of padding.


@dataclass(frozen=True)
class RelationPair:
    """Queries, keys or values of one layer of each model; the two may have different numbers of heads and widths."""

    student: Tensor  #: [B, S, D_student], with graph: all heads side by side.
    teacher: Tensor  #: [B, S, D_teacher], detached.
    visible: Tensor  #: [B, S, S] bool: which tokens a token is related to; False in the rows of padding.


@dataclass(frozen=True)
class Stones:
    """Logits of the stepping stones: the student's first blocks followed by the rest of the teacher's."""

    students: tuple[Tensor, ...]  #: Each [n, V] with graph, from the fewest blocks of the student to all of them.
    teacher: TeacherLogits
