"""Decoupled distillation: the label's probability, and the distribution of the others, weighted apart.

Zhao et al., Decoupled Knowledge Distillation (CVPR 2022).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from layer_surgery.healing.losses.inputs import TokenLogits
from layer_surgery.healing.losses.outcomes import dense_log_probs, known_teacher, without
from layer_surgery.healing.losses.registry import LOSSES, NOT_NEGATIVE, POSITIVE


class Decoupled(NamedTuple):
    """The two parts of KL(p || q) = `target + (1 - p_y) others` [n], in nats."""

    target: Tensor  # [n] KL between (p_y, 1 - p_y) and (q_y, 1 - q_y)
    others: Tensor  # [n] KL between the distributions without the label
    label_probability: Tensor  # [n] p_y, the teacher's


@LOSSES.add(
    "dkd",
    needs="logits",
    allowed={"temperature": POSITIVE, "alpha": NOT_NEGATIVE, "beta": NOT_NEGATIVE},
)
def decoupled_kd(tokens: TokenLogits, *, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0) -> Tensor:
    """Return T^2 (a TCKD + b NCKD) [n]; the paper raises its weight slowly at the beginning of training.

    Needs the whole distribution: the label may be outside of the teacher's top k, where its probability is unknown.
    """
    parts = decouple(tokens, temperature)
    return temperature**2 * (alpha * parts.target + beta * parts.others)


def decouple(tokens: TokenLogits, temperature: float) -> Decoupled:
    """Return both parts at a temperature, not yet multiplied by its square."""
    label = tokens.labels
    p = dense_log_probs(known_teacher(tokens), temperature)
    q = (tokens.student / temperature).log_softmax(dim=-1)
    p_label, q_label = (each.gather(1, label[:, None]).squeeze(1) for each in (p, q))
    (p_rest, p_others), (q_rest, q_others) = without(p, label), without(q, label)
    target = p_label.exp() * (p_label - q_label) + p_rest.exp() * (p_rest - q_rest)
    return Decoupled(target, (p_others.exp() * (p_others - q_others)).sum(dim=1), p_label.exp())
