"""Vectors at length 1."""

from torch import Tensor
from torch.nn.functional import normalize


def unit(vectors: Tensor) -> Tensor:
    """Return vectors [n, D] at length 1. Raises `ValueError` if one is zero or not finite."""
    lengths = vectors.detach().norm(dim=1)
    without = (~(lengths.isfinite() & (lengths > 0))).nonzero().flatten()
    if len(without):
        raise ValueError(f"the vector of text {int(without[0])} (counted from 0) is zero or not finite")
    return normalize(vectors, dim=1, eps=0.0)
