"""Products and inverses of large symmetric and triangular matrices, in half of the operations.

Knows torch only. torch has no product for them that leaves out what is known already, so they are formed by blocks: all
work is in products of dense matrices, which every device is good at, and little exists beside the result.
"""

import torch
from torch import Tensor

from layer_surgery.devices import block_rows


def sandwich(left: Tensor, middle: Tensor) -> Tensor:
    """Return `X S X^T` [n, n] for X [n, m] and a symmetric S [m, m], exactly symmetric, in the dtype of X.

    With `S = T + T^T`, T triangular, it is `X T X^T` and the transpose of that: half of the products with S.
    """
    columns, step = left.T, block_rows(left.device)
    half = torch.empty_like(columns)
    for start in range(0, len(middle), step):
        rows = middle[start : start + step, : start + step].to(left.dtype, copy=True)
        rows[:, start:] *= 0.5  # the block on the diagonal, once here and once in the transpose
        half[start : start + step] = rows @ columns[: start + step]
    product = left @ half
    return product + product.T


def transposed_times(triangle: Tensor, right: Tensor) -> Tensor:
    """Return `L^T R` [n, k] for a lower triangular L [n, n] and R [n, k], in the dtype of R."""
    step = block_rows(right.device)
    parts = [
        triangle[start:, start : start + step].to(right.dtype).T @ right[start:]
        for start in range(0, len(triangle), step)
    ]
    return torch.cat(parts) if parts else right.clone()


def positive_inverse(matrix: Tensor) -> Tensor | None:
    """Return the inverse [d, d] of a symmetric positive definite matrix, None if it is not positive definite.

    With the Cholesky factor L, `X = L^-1` a block of columns at a time, in the place of L, and `X^T X`, both without
    what is zero: the operations of LAPACK's `potri`, in products.
    """
    triangle, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    d, step = len(matrix), block_rows(matrix.device)
    for start in range(0, d, step):
        columns = torch.eye(d - start, min(step, d - start), dtype=matrix.dtype, device=matrix.device)
        triangle[start:, start : start + step] = torch.linalg.solve_triangular(
            triangle[start:, start:], columns, upper=False
        )
    inverse = torch.empty_like(triangle)
    for start in range(0, d, step):
        rows = triangle[start:, start : start + step].T @ triangle[start:, : start + step]
        corner = rows[:, start:]
        corner.copy_((corner + corner.T) / 2)
        inverse[start : start + step, : start + step] = rows
        inverse[: start + step, start : start + step] = rows.T
    return inverse
