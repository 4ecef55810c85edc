"""The vectors that a student of embedding models is to be like: those of one teacher, or of several side by side.

Method: Zhang et al., Jasper and Stella (https://arxiv.org/abs/2412.19048), section 2.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def joined(teachers: Sequence[Tensor]) -> Tensor:
    """Return the vectors [n, sum of D] of several teachers of the same n texts as one: each of length 1, then all.

    So `t_i . t_j` is the mean of the teachers' cosine similarities. Raises `ValueError`: there is no teacher, they
    have different numbers of texts, or a vector is zero or not finite, so that it has no direction.
    """
    counts = sorted({len(vectors) for vectors in teachers})
    if len(counts) != 1:
        raise ValueError(f"teachers must have vectors of the same texts, not of {counts or 'none'}")
    return normalize(torch.cat([unit(vectors) for vectors in teachers], dim=1), dim=1)


def unit(vectors: Tensor) -> Tensor:
    """Return vectors [n, D] at length 1. Raises `ValueError` if one is zero or not finite."""
    lengths = vectors.detach().norm(dim=1)
    without = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten()
    if len(without):
        raise ValueError(f"the vector of text {int(without[0])} (counted from 0) is zero or not finite")
    return normalize(vectors, dim=1, eps=0.0)
