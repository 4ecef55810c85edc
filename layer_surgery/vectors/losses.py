"""How far a student's vectors of some texts are from the teacher's: alone, in pairs, and in the order of pairs.

Method: Zhang et al., Jasper and Stella (https://arxiv.org/abs/2412.19048), section 2.2. Only texts are needed: no
labels and no pairs that are known to be alike. Shapes: m texts, D dimensions of the student, T of the teacher.
"""

import torch
from torch import Tensor

from layer_surgery.vectors.relative import relative_similarity

#: The paper's, in the relative similarity term.
MARGIN = 0.015


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum over texts of `1 - s.t` [] of vectors of length 1, [m, D] both."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"a cosine term needs vectors of the same size, and the student's have {student.shape[1]} numbers where "
            f"the teacher's have {teacher.shape[1]}; leave it out"
        )
    return (1 - (student * teacher).sum(dim=1)).sum()


def similarity_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over all m^2 entries of `(S S^T - T T^T)^2` [], of vectors [m, D] and [m, T] of length 1."""
    return (student @ student.T - teacher @ teacher.T).square().mean()


def order_error(student: Tensor, teacher: Tensor, margin: float = MARGIN) -> Tensor:
    """Return the relative similarity term [] in float64 over the m(m - 1)/2 pairs of different texts; see `relative`.

    The similarities are computed in float64 too: in float32, pairs that are alike by rounding would have an order.
    """
    s, t = student.double(), teacher.double()
    rows, columns = torch.triu_indices(len(s), len(s), offset=1, device=s.device)
    return relative_similarity((s @ s.T)[rows, columns], (t @ t.T)[rows, columns], margin)
