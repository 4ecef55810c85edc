"""Vectors of an embedding model compared with the teacher's: alone, in pairs, and in the order of pairs.

Method: Zhang et al., Jasper and Stella (https://arxiv.org/abs/2412.19048), section 2.2, here with means over the texts
of a batch throughout, so that weights mean the same in batches of every size. Shapes: m texts, D numbers of the
student's vectors, T of the teacher's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from layer_surgery.healing.losses.inputs import VectorPair
from layer_surgery.healing.losses.registry import LOSSES, NOT_NEGATIVE
from layer_surgery.healing.losses.states import PROJECTED
from layer_surgery.vectors.losses import MARGIN, cosine_distance, order_error, similarity_error

#: Ridge of the first map, as a share of the mean square of the student's numbers: there may be fewer texts than those.
_RIDGE = 1e-3


@LOSSES.add(
    "embedding_cosine",
    needs="vectors",
    teachers=(),
    arranged=PROJECTED,
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


class VectorProjection(nn.Module):
    """A linear map of the student's vectors into the teachers' space, trained with it and then thrown away.

    It is the paper's projection, whose first stage trains it alone; here it begins where that would end, at the least
    squares of some texts.
    """

    @torch.no_grad()
    def __init__(self, student: Tensor, teacher: Tensor, dtype: torch.dtype) -> None:
        """Fit the map [T, D] to vectors [n, D] and [n, T] of the same texts."""
        super().__init__()
        s, t = normalize(student.double(), dim=1), normalize(teacher.double(), dim=1)
        gram = s.T @ s
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
        self.weight = nn.Parameter(torch.linalg.solve(gram, s.T @ t).T.to(dtype).contiguous())

    def forward(self, vectors: Tensor) -> Tensor:
        """Map [m, D] to [m, T]."""
        return vectors @ self.weight.T


def _directions(pair: VectorPair) -> tuple[Tensor, Tensor]:
    return normalize(pair.student, dim=1), normalize(pair.teacher, dim=1)
