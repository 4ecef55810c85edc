"""Distributions of teacher and student over the same outcomes: tokens, or the teacher's top k and all others as one.

Merging outcomes never raises a divergence between distributions (data processing), and with k = V nothing is merged.
So what is computed over k + 1 outcomes is at most what it is over the vocabulary; renormalising the top k instead
gives a different distribution, which a perfect student would not have. Shapes: n tokens, V vocabulary, k entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layer_surgery.errors import UserError
from layer_surgery.healing.losses.inputs import TeacherLogits, TokenLogits

#: Log-probability of what cannot happen: its exponential is 0 exactly, and differences and gradients stay finite.
_NEVER = -1e4


class Outcomes(NamedTuple):
    """Log-probabilities of m outcomes that exclude each other; both rows sum to 1 but for a sampled teacher's."""

    teacher: Tensor  # [n, m], without graph
    student: Tensor  # [n, m]


def outcomes(tokens: TokenLogits, temperature: float) -> Outcomes:
    """Return both distributions at a temperature over the vocabulary, or over the teacher's top k and the rest.

    Of a sampled teacher the outcomes are what was drawn. Raises `UserError` if a sparse record was made at another
    temperature: the tail's mass cannot be computed from it.
    """
    teacher, logits = known_teacher(tokens), tokens.student
    if temperature != 1:
        logits = logits / temperature
    if teacher.ids is None:
        return Outcomes(dense_log_probs(teacher, temperature), logits.log_softmax(dim=1).clamp_min(_NEVER))
    if teacher.temperature != temperature:
        raise UserError(
            f"the teacher's top tokens were kept at temperature {teacher.temperature:g}, and the loss has temperature "
            f"{temperature:g}; give both the same, or run the teacher beside the student."
        )
    absent, ids = teacher.ids < 0, teacher.ids.clamp_min(0)
    log_probs = teacher.log_probs.to(logits.dtype).clamp_min(_NEVER).masked_fill(absent, _NEVER)
    entries = logits.gather(1, ids).masked_fill(absent, _lowest(logits))
    if teacher.tail is None:
        return Outcomes(log_probs, (entries - logits.logsumexp(dim=1, keepdim=True)).clamp_min(_NEVER))
    outside = _outside(logits, ids, absent)
    student = torch.cat([entries, outside], dim=1)
    student = student - torch.logaddexp(entries.logsumexp(dim=1, keepdim=True), outside)
    tail = teacher.tail.to(logits.dtype).clamp_min(_NEVER)
    return Outcomes(torch.cat([log_probs, tail[:, None]], dim=1), student.clamp_min(_NEVER))


def known_teacher(tokens: TokenLogits) -> TeacherLogits:
    """Return the teacher of tokens that must have one."""
    if tokens.teacher is None:
        raise ValueError("this loss compares with a teacher, and the tokens have none")
    return tokens.teacher


def dense_log_probs(teacher: TeacherLogits, temperature: float) -> Tensor:
    """Return the teacher's whole distribution [n, V] at a temperature, each log-probability finite."""
    if teacher.ids is not None:
        raise ValueError("this loss needs the teacher's whole distribution")
    log_probs = teacher.log_probs
    if temperature != teacher.temperature:
        log_probs = (log_probs * (teacher.temperature / temperature)).log_softmax(dim=-1)
    return log_probs.clamp_min(_NEVER)


def _outside(logits: Tensor, ids: Tensor, absent: Tensor) -> Tensor:
    """Return the logsumexp [n, 1] of the logits outside `ids`, summed up: 1 - (mass inside) would be rounding."""
    # A padded place must not undo a real one with the same id: count, not set.
    count = torch.zeros(logits.shape, dtype=torch.uint8, device=logits.device)
    count.scatter_add_(1, ids, (~absent).to(torch.uint8))
    return logits.masked_fill(count > 0, _lowest(logits)).logsumexp(dim=1, keepdim=True)


def _lowest(logits: Tensor) -> float:
    """Return a logit that has no mass beside any other, and that can be subtracted from one."""
    return torch.finfo(logits.dtype).min / 4


def without(log_probs: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Split off one outcome of each row: return log-probability [n] of all others, and theirs among themselves [n, m].

    In the second, the outcome that was split off has no mass.
    """
    rest = log_probs.scatter(1, column[:, None], _NEVER)
    mass = rest.logsumexp(dim=1)
    return mass, (rest - mass[:, None]).scatter(1, column[:, None], _NEVER)
