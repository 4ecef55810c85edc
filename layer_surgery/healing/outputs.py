"""Outputs of a head as what losses compare: a distribution over tokens or labels for each item that carries loss.

Those of an embedding model are vectors, which have losses of their own (`losses/vectors.py`).

An item is a token, or a sequence where there is one answer for a whole one. Of several labels each has a distribution
of its own, over yes and no, as the head's own loss takes them. A regression's numbers are means of normal distributions
with variance 1, so `kl` and `ce` are half the squared differences, and other losses are not defined.
Shapes: n items, V vocabulary, L outputs of a classifier, m losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange, reduce
from torch import Tensor

from layer_surgery.data.objective import Objective
from layer_surgery.errors import UserError
from layer_surgery.healing.losses import LOSSES
from layer_surgery.healing.losses.inputs import TeacherLogits, TokenLogits
from layer_surgery.healing.mixture import WeightedLoss, token_values
from layer_surgery.walk.rehearsal import Rehearsal

#: Losses that compare numbers.
_OF_NUMBERS = ("kl", "ce")
#: Losses that look at an item's outcomes beside each other's, of which yes and no would show them one only.
_OF_SEVERAL_OUTCOMES = ("clkd", "dkd")


class TeacherAnswers(Protocol):
    """What a teacher says of n items, read as many at a time as fit."""

    def rows(self, rows: slice) -> TeacherLogits:
        """Return what it says of some of them."""
        ...


@dataclass(frozen=True)
class HiddenAnswers:
    """All that a teacher says of n tokens, as its states: its head makes outputs of those that are asked for."""

    hidden: Tensor  #: [n, D] after its last layer.
    head: Callable[[Tensor], Tensor]  #: From states [c, D] to outputs [c, V].
    objective: Objective

    @torch.no_grad()
    def rows(self, rows: slice) -> TeacherLogits:
        return teacher_outputs(self.head(self.hidden[rows]), self.objective)


def check_losses(losses: Sequence[WeightedLoss], objective: Objective) -> None:
    """Raise `UserError` for a loss over outputs that a head does not allow."""
    embeds = objective.problem == "embedding"
    for loss in losses:
        if loss.entry.needs == "vectors" and not embeds:
            raise UserError(f"--loss {loss.name} compares embeddings, but the model gives none; take another loss.")
        if loss.entry.needs == "stones" and objective.of_sequences and not embeds:
            raise UserError(
                f"--loss {loss.name} compares models token by token, but the model gives one answer a sequence; take "
                "another loss, such as kl."
            )
        if loss.entry.needs in ("labels", "logits", "relations", "stones") and embeds:
            known = ", ".join(each.name for each in LOSSES if each.needs == "vectors")
            raise UserError(
                f"--loss {loss.name} is for models with a head, but this one gives embeddings; allowed for an "
                f"embedding model: {known}, and losses of hidden states."
            )
        if loss.entry.needs not in ("labels", "logits"):
            continue
        if objective.problem == "regression" and (loss.name not in _OF_NUMBERS or loss.options):
            what = f"with {', '.join(loss.options)}" if loss.name in _OF_NUMBERS else "of distributions"
            raise UserError(
                f"--loss {loss.name} is a loss {what}, but the model gives numbers; allowed for a regression: kl and "
                "ce without options, and losses of hidden states."
            )
        if objective.problem == "multi_label" and loss.name in _OF_SEVERAL_OUTCOMES:
            raise UserError(
                f"--loss {loss.name} compares labels with each other, but the model decides on each by itself; take "
                "another loss, such as kl."
            )


def token_outputs(rehearsal: Rehearsal, hidden: Tensor) -> Tensor:
    """Return the head's outputs [n, V], float32 or better, for states [n, D] after the last layer, each by itself."""
    outputs = rehearsal.head(hidden[:, None])[:, 0]  # sequences of one token: none is too long for any model
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def item_values(
    losses: Sequence[WeightedLoss], outputs: Tensor, labels: Tensor, teacher: TeacherLogits | None, objective: Objective
) -> Tensor:
    """Return each loss of each item, without weights [m, n].

    Args:
        losses: over outputs and labels; `check_losses` has let them pass.
        outputs: [n, V or L] the student's, float32 or better, with graph.
        labels: [n] int64; of several labels or of numbers [n, L] float.
        teacher: what it says of these items, as `teacher_outputs` makes it.
    """
    if objective.problem == "regression":
        return _number_values(losses, outputs, labels.to(outputs.dtype), teacher)
    if objective.problem == "multi_label":
        yes_is_first = rearrange(1 - labels.long(), "n labels -> (n labels)")
        each = token_values(losses, TokenLogits(student=_yes_and_no(outputs), teacher=teacher, labels=yes_is_first))
        return reduce(each, "m (n labels) -> m n", "mean", labels=outputs.shape[1])
    return token_values(losses, TokenLogits(student=outputs, teacher=teacher, labels=labels))


def teacher_outputs(outputs: Tensor, objective: Objective) -> TeacherLogits:
    """Return what a teacher with these outputs [n, L], all of them, says; of a regression the numbers themselves."""
    if objective.problem == "regression":
        return TeacherLogits(log_probs=outputs)
    if objective.problem == "multi_label":
        outputs = _yes_and_no(outputs)
    return TeacherLogits(log_probs=outputs.log_softmax(dim=-1))


def _yes_and_no(outputs: Tensor) -> Tensor:
    """Return logits [n L, 2] of yes and no for each label: of outputs z, sigmoid(z) is softmax((z, 0))."""
    flat = rearrange(outputs, "n labels -> (n labels)")
    return torch.stack([flat, torch.zeros_like(flat)], dim=1)


def _number_values(
    losses: Sequence[WeightedLoss], outputs: Tensor, labels: Tensor, teacher: TeacherLogits | None
) -> Tensor:
    found = []
    for loss in losses:
        if loss.entry.needs == "logits":
            assert teacher is not None, "a loss that compares with the teacher needs it"
            wanted = teacher.log_probs.to(outputs)
        else:
            wanted = labels
        found.append((outputs - wanted).square().mean(dim=1) / 2)
    return torch.stack(found)
