"""Pure linear algebra of low-rank replacements. Knows torch (and einops) only.

Shapes: W [out, in] a weight, r a rank, k = min(out, in). Factors multiply to `left @ right`, [out, r] @ [r, in].
Plain decompositions run in float32, or in float64 for float64 input; whitened ones in float64.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor


class Factors(NamedTuple):
    """`left @ right` stands for a weight [out, in]."""

    left: Tensor  # [out, r]
    right: Tensor  # [r, in]


def no_components(size: tuple[int, int]) -> Factors:
    """Return factors of rank 0 for a weight [out, in] of this size: their product is zero."""
    out, in_ = size
    return Factors(torch.zeros(out, 0), torch.zeros(0, in_))


class Spectrum(NamedTuple):
    """`u @ diag(s) @ vh`, singular values in descending order."""

    u: Tensor  # [out, k]
    s: Tensor  # [k]
    vh: Tensor  # [k, in]


def svd(weight: Tensor) -> Spectrum:
    """Return the thin singular value decomposition of [out, in]."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return Spectrum(*torch.linalg.svd(weight, full_matrices=False))


def select_groups(spectrum: Spectrum, chosen: Tensor) -> Factors:
    """Return factors of the chosen singular groups [r] int64, as U sqrt(S) and sqrt(S) V^T.

    The even split keeps both factors of the same magnitude, which suits 16-bit storage.
    """
    root = spectrum.s[chosen].sqrt()
    return Factors(spectrum.u[:, chosen] * root, root[:, None] * spectrum.vh[chosen])


def truncated(spectrum: Spectrum, rank: int) -> Factors:
    """Return the factors of rank `rank` nearest to a weight in Frobenius norm (Eckart & Young, 1936), from its SVD."""
    return select_groups(spectrum, torch.arange(rank, device=spectrum.s.device))


def singular_value_gradients(spectrum: Spectrum, gradient: Tensor) -> Tensor:
    """Return dLoss/ds [k] for `W = U diag(s) V^T`, given dLoss/dW [out, in]: `u_k^T G v_k`, in closed form."""
    return einsum(spectrum.u, gradient.to(spectrum.u.dtype), spectrum.vh, "out k, out inp, k inp -> k")


def attributed_groups(spectrum: Spectrum, gradient: Tensor, rank: int) -> Tensor:
    """Return the indices [rank] of the singular groups with the largest `|s_k * dLoss/ds_k|`, best first.

    This is GRASP's importance (https://arxiv.org/abs/2501.00339).
    """
    importance = (spectrum.s * singular_value_gradients(spectrum, gradient)).abs()
    return importance.argsort(descending=True, stable=True)[:rank]


class WhitenedFactors(NamedTuple):
    """A truncation of a weight in a metric, one component after the other, best first."""

    factors: Factors  # the first r columns and rows are the best rank-r replacement, for every r
    values: Tensor  # [k] singular values in the metric; leaving component j out costs 1/2 values[j]^2


def shrunk(moment: Tensor, tokens: int) -> Tensor:
    """Return a second moment [d, d] drawn towards a multiple of the identity, so that it can be inverted.

    The share of the identity is the oracle-approximating one (Chen, Wiesel, Eldar & Hero, Shrinkage Algorithms for MMSE
    Covariance Estimation, 2010): small with many tokens, growing smoothly to 1 as they get fewer, also far below d.
    """
    d = moment.shape[0]
    trace, squares = float(moment.trace()), float((moment**2).sum())
    if trace <= 0:
        return torch.eye(d, dtype=moment.dtype, device=moment.device)
    numerator = (1 - 2 / d) * squares + trace**2
    denominator = (tokens + 1 - 2 / d) * (squares - trace**2 / d)
    share = 1.0 if denominator <= 0 else min(1.0, numerator / denominator)
    share = max(share, 1e-6)  # what float64 needs in any case
    result = (1 - share) * moment
    result.diagonal().add_(share * trace / d)
    return result


def whitened_svd(weight: Tensor, inputs: Tensor, outputs: Tensor | None = None) -> WhitenedFactors:
    """Return the truncations of W [out, in] that are best in the metric `1/2 tr(B D A D^T)`, D the change of W.

    `inputs` is A [in, in], `outputs` is B [out, out] (None: the identity). With A = L_A L_A^T and B = L_B L_B^T, the
    singular value decomposition U S V^T of `M = L_B^T W L_A` gives `W_r = L_B^-T U_r S_r V_r^T L_A^-1`. A alone is
    SVD-LLM (https://arxiv.org/abs/2403.07378); both are a Kronecker-factored Fisher metric
    (https://arxiv.org/abs/2505.17974). A and B must be positive definite: see `shrunk`.

    Solved in float64, by the eigendecomposition of the smaller of `M M^T` and `M^T M`. From its vectors U follows
    `W_r = (L_B^-T U_r) (U_r^T L_B^T W)`, and in the same way from V, so only one triangle is solved with.
    """
    w, left_a = weight.double(), torch.linalg.cholesky(inputs.double())
    left_b = None if outputs is None else torch.linalg.cholesky(outputs.double())
    output_side = w if left_b is None else left_b.T @ w
    whitened = output_side @ left_a
    if whitened.shape[0] <= whitened.shape[1]:
        squares, u = _leading_first(whitened @ whitened.T)
        left = u if left_b is None else torch.linalg.solve_triangular(left_b.T, u, upper=True)
        right = u.T @ output_side
    else:
        squares, v = _leading_first(whitened.T @ whitened)
        left = w @ (left_a @ v)
        right = torch.linalg.solve_triangular(left_a, v.T, upper=False, left=False)
    return WhitenedFactors(balanced(Factors(left, right)), squares.clamp_min(0.0).sqrt())


def balanced(factors: Factors) -> Factors:
    """Return factors of the same product, each component of the same magnitude in both: that suits 16-bit storage."""
    left, right = factors
    tiny = torch.finfo(left.dtype).tiny
    balance = (right.norm(dim=1).clamp_min(tiny) / left.norm(dim=0).clamp_min(tiny)).sqrt()
    return Factors(left * balance, right / balance[:, None])


def _leading_first(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues [k] and vectors [k, k] (columns) of a symmetric matrix, the largest first."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors.flip(1)


def knapsack(values: Sequence[Sequence[float]], costs: Sequence[int], limits: Sequence[int], budget: int) -> list[int]:
    """Return a rank for every matrix: components by worth `1/2 value^2` per parameter, best first, while they fit.

    `values[m]` are the singular values of matrix m in descending order, `costs[m]` the parameters of one rank,
    `limits[m]` its largest rank. Every matrix gets at least one. The sum of `rank * cost` is at most `budget`, and
    below it by less than the cheapest rank that is left. Raises `ValueError` if one rank each does not fit.
    """
    ranks = [1] * len(costs)
    left = budget - sum(costs)
    if left < 0:
        raise ValueError(f"one rank in each matrix costs {sum(costs)}, the budget is {budget}")
    heap = [(-_worth(values[m], 1) / costs[m], m) for m in range(len(costs)) if limits[m] > 1]
    heapq.heapify(heap)
    while heap:
        _, m = heapq.heappop(heap)
        if costs[m] > left:
            continue  # it will not fit later either
        left -= costs[m]
        ranks[m] += 1
        if ranks[m] < limits[m]:
            heapq.heappush(heap, (-_worth(values[m], ranks[m]) / costs[m], m))
    return ranks


def _worth(values: Sequence[float], component: int) -> float:
    return 0.5 * values[component] ** 2 if component < len(values) else 0.0
