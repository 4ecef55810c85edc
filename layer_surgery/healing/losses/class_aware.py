"""Class-aware logit distillation (CLKD): logits compared by token, by class, and by how classes go together.

Zhang, Liu, Hopcroft & He, Class-aware Information for Logit-based Knowledge Distillation. For language models a class
is a token of the vocabulary and an instance a token of the text. Shapes: n tokens of the chunk, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from layer_surgery.healing.losses.inputs import TokenLogits
from layer_surgery.healing.losses.outcomes import dense_log_probs, known_teacher
from layer_surgery.healing.losses.registry import LOSSES, NOT_NEGATIVE


@LOSSES.add(
    "clkd",
    needs="logits",
    allowed={"classes": NOT_NEGATIVE, "correlation": NOT_NEGATIVE},
    across_tokens=True,
)
def class_aware_kd(tokens: TokenLogits, *, classes: float = 2.0, correlation: float = 0.4) -> Tensor:
    """Return the loss for each token [n]; its mean over the chunk is

        |rows_s - rows_t|^2 averaged over tokens + `classes` * |columns_s - columns_t|^2 averaged over classes
        + `correlation` * (C_s - C_t)^2 averaged over all pairs of classes,

    rows and columns of the logits [n, V] of unit length, C [V, V] the correlations of classes over the chunk. Squares
    are summed along rows and columns, so that no term vanishes with a large vocabulary. A token's logits are defined
    up to a constant, so they are centred first. C is never formed: `|X^T X|^2 = |X X^T|^2`.
    """
    student = _centred(tokens.student, dim=1)
    teacher = _centred(dense_log_probs(known_teacher(tokens), 1.0), dim=1)
    n = student.shape[0]
    by_token = (normalize(student, dim=1) - normalize(teacher, dim=1)).square().sum(dim=1)
    by_class = n * (normalize(student, dim=0) - normalize(teacher, dim=0)).square().mean(dim=1)
    return by_token + classes * by_class + correlation * _correlations(student, teacher)


def _correlations(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference [] of the correlations of classes over the chunk."""
    s, t = (normalize(_centred(each, dim=0), dim=0) for each in (student, teacher))
    squares = (s @ s.T).square().sum() - 2 * (s @ t.T).square().sum() + (t @ t.T).square().sum()
    return squares / s.shape[1] ** 2


def _centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim=dim, keepdim=True)
