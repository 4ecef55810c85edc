"""Vectors in fewer bytes: their first numbers, in float32, int8 or one bit each.

Shapes: n texts, D numbers of a vector.
"""

import torch
from torch import Tensor

from layer_surgery.vectors.unit import unit

#: Bits of a number.
BITS = {"float32": 32, "int8": 8, "binary": 1}


def bytes_per_vector(dimensions: int, storage: str) -> int:
    """Return what a vector takes; bits are filled up to whole bytes."""
    return -(-dimensions * BITS[storage] // 8)


def prefix(vectors: Tensor, dimensions: int) -> Tensor:
    """Return the first numbers of vectors [n, D], at length 1 again, [n, dimensions]."""
    return unit(vectors[:, :dimensions])


def read_back(vectors: Tensor, storage: str) -> Tensor:
    """Return what is left of vectors [n, D] that were stored, [n, D] float32 of length 1.

    `int8` rounds to 127 steps of either sign, the same for all numbers of all vectors: the largest of them is the last
    step. So products of what is stored are products of vectors, but for one factor. `binary` keeps the sign; the
    product of two vectors is then `1 - 2 (bits that differ) / D`. 0 counts as negative.
    """
    vectors = vectors.float()
    if storage == "int8":
        vectors = (vectors * (127 / vectors.abs().max())).round()
    elif storage == "binary":
        vectors = torch.where(vectors > 0, 1.0, -1.0)
    elif storage != "float32":
        raise ValueError(f"storage is {storage!r}; allowed: {', '.join(BITS)}")
    return unit(vectors)
