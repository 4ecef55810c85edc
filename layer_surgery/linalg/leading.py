"""Truncations in a metric for wide matrices: bound by matrix products, up to a rank that is asked for.

Knows torch only. What `low_rank.whitened_svd` finds, from the smaller side alone: with `M = L_B^T W L_A`, the products
`M M^T = (L_B^T W) A (L_B^T W)^T` and `M^T M = (W L_A)^T B (W L_A)` need the Cholesky factor of the smaller side only,
and the trace of either is the sum of all squared singular values. Products of the wide matrices run in float32: the
moments are float32 sums, and what is rounded away is a fraction of about 1e-6 of the largest squared value.
Factorisations, triangular solves and sums run in float64.
"""

import torch
from torch import Tensor

from layer_surgery.linalg.low_rank import Factors, WhitenedFactors, balanced
from layer_surgery.linalg.symmetric import sandwich, transposed_times

#: Columns of the random sketch beyond the rank, as a fraction of the rank, and at least.
_OVERSAMPLING, _LEAST_OVERSAMPLING = 1 / 8, 32
#: A sketch this large, as a fraction of the matrix, costs as much as the whole decomposition.
_DENSE = 0.6
#: Products with the matrix before the Rayleigh-Ritz step; the matrix is a square already, so each counts twice.
_ITERATIONS = 3


def leading_whitened_svd(
    weight: Tensor, inputs: Tensor, outputs: Tensor | None = None, rank: int | None = None
) -> WhitenedFactors:
    """Return truncations of W [out, in] up to a rank in the metric `1/2 tr(B D A D^T)`; see `low_rank.whitened_svd`.

    The factors are [out, rank] and [rank, in]; of the values [min(out, in)], those behind `rank` are the root mean
    square of what is left of the trace. So what a truncation to at most `rank` costs is what these factors lose, and at
    rank 0 it is exact, also where the subspace is not. Without a rank, all components.
    """
    out, in_ = weight.shape
    w, small = weight.float(), min(out, in_)
    rank = small if rank is None else min(rank, small)
    if out <= in_:
        factor = None if outputs is None else torch.linalg.cholesky(outputs.double())
        whitened = w if factor is None else transposed_times(factor, w)  # L_B^T W [out, in]
        gram = sandwich(whitened, inputs)
        squares, u = leading_eigenpairs(gram, rank)
        left = u.double() if factor is None else torch.linalg.solve_triangular(factor.T, u.double(), upper=True)
        right = (u.T @ whitened).double()
    else:
        factor = torch.linalg.cholesky(inputs.double())
        whitened = transposed_times(factor, w.T)  # L_A^T W^T [in, out]
        gram = whitened @ whitened.T if outputs is None else sandwich(whitened, outputs)
        squares, v = leading_eigenpairs(gram, rank)
        left = (whitened.T @ v).double()
        right = torch.linalg.solve_triangular(factor, v.T.double(), upper=False, left=False)
    rest = max(float(gram.diagonal().sum(dtype=torch.float64) - squares.sum()), 0.0)
    behind = squares.new_full((small - rank,), rest / max(small - rank, 1))
    return WhitenedFactors(balanced(Factors(left, right)), torch.cat([squares, behind]).sqrt())


def leading_eigenpairs(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the `rank` largest eigenvalues [rank] float64 and vectors [n, rank] of a positive semidefinite [n, n].

    By randomised subspace iteration with a Rayleigh-Ritz step (Halko, Martinsson & Tropp, Finding structure with
    randomness, 2011) in the dtype of the matrix, from a sketch that depends on the sizes only: the same for every run
    and device. A value is what its vector holds of the trace, also where the iteration has not converged. Where the
    rank is so large that this costs more than all of them, by the eigendecomposition.
    """
    n = len(gram)
    sketch = rank + max(_LEAST_OVERSAMPLING, int(_OVERSAMPLING * rank))
    basis = None if sketch >= _DENSE * n else _subspace(gram, sketch)
    within = gram if basis is None else basis.T @ (gram @ basis)
    values, vectors = torch.linalg.eigh((within + within.T) / 2)
    largest = slice(len(values) - rank, None)
    vectors = vectors[:, largest] if basis is None else basis @ vectors[:, largest]
    return values[largest].flip(0).double().clamp_min(0.0), vectors.flip(1)


def _subspace(gram: Tensor, size: int) -> Tensor:
    """Return an orthonormal basis [n, size] of about the leading vectors of [n, n]."""
    generator = torch.Generator().manual_seed(len(gram))
    basis = torch.randn(len(gram), size, generator=generator, dtype=gram.dtype).to(gram.device)
    for _ in range(_ITERATIONS):
        basis, _triangle = torch.linalg.qr(gram @ basis)
    return basis
