"""Vectors of an embedding model compared with the teacher's: alone, in pairs, and in the order of pairs.

Method: Zhang et al., Jasper and Stella (https://arxiv.org/abs/2412.19048), section 2.2, here with means over the texts
of a batch throughout, so that weights mean the same in batches of every size. Shapes: m texts, D numbers of the
student's vectors, T of the teacher's.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from layer_surgery.healing.losses.inputs import VectorPair
from layer_surgery.healing.losses.registry import LOSSES, NOT_NEGATIVE
from layer_surgery.vectors.losses import MARGIN, cosine_distance, order_error, similarity_error


@LOSSES.add(
    "embedding_cosine",
    needs="vectors",
    teachers=(),
)
def embedding_cosine(pair: VectorPair) -> Tensor:
    """Return the mean over texts of `1 - cos(s, t)` []. Raises `ValueError` if D is not T."""
    return cosine_distance(*_directions(pair)) / len(pair.student)


@LOSSES.add(
    "embedding_similarity",
    needs="vectors",
    teachers=(),
)
def embedding_similarity(pair: VectorPair) -> Tensor:
    """Return the mean over all m^2 pairs of texts of `(cos(s_i, s_j) - cos(t_i, t_j))^2` []."""
    return similarity_error(*_directions(pair))


@LOSSES.add(
    "embedding_relative",
    needs="vectors",
    teachers=(),
    allowed={"margin": NOT_NEGATIVE},
)
def embedding_relative(pair: VectorPair, *, margin: float = MARGIN) -> Tensor:
    """Return the mean of `relu(b_q - b_p + margin)` [] over pairs p, q that are more and less alike to the teacher.

    b are the student's cosines. It is not 0 where the two are the same: pairs are to be the margin apart.
    """
    student, teacher = _directions(pair)
    return order_error(student, teacher, margin).to(student)


def _directions(pair: VectorPair) -> tuple[Tensor, Tensor]:
    return normalize(pair.student, dim=1), normalize(pair.teacher, dim=1)
