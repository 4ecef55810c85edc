"""Pure linear algebra of low-rank replacements. Knows torch only.

Shapes: W [out, in] a weight, r a rank, k = min(out, in). Factors multiply to `left @ right`, [out, r] @ [r, in].
Decompositions run in float32, or in float64 for float64 input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from layer_surgery.modeling_layer_surgery import LowRankLinear

__all__ = ["Factors", "LowRankLinear", "attributed_groups", "select_groups", "svd", "truncated_svd"]


class Factors(NamedTuple):
    """`left @ right` stands for a weight [out, in]."""

    left: Tensor  # [out, r]
    right: Tensor  # [r, in]


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


def truncated_svd(weight: Tensor, rank: int) -> Factors:
    """Return the factors of rank `rank` nearest to `weight` in Frobenius norm (Eckart & Young, 1936)."""
    spectrum = svd(weight)
    return select_groups(spectrum, torch.arange(rank, device=weight.device))


def singular_value_gradients(spectrum: Spectrum, gradient: Tensor) -> Tensor:
    """Return dLoss/ds [k] for `W = U diag(s) V^T`, given dLoss/dW [out, in]: `u_k^T G v_k`, in closed form."""
    return einsum(spectrum.u, gradient.to(spectrum.u.dtype), spectrum.vh, "out k, out inp, k inp -> k")


def attributed_groups(spectrum: Spectrum, gradient: Tensor, rank: int) -> Tensor:
    """Return the indices [rank] of the singular groups with the largest `|s_k * dLoss/ds_k|`, best first.

    This is GRASP's importance (https://arxiv.org/abs/2501.00339).
    """
    importance = (spectrum.s * singular_value_gradients(spectrum, gradient)).abs()
    return importance.argsort(descending=True, stable=True)[:rank]
