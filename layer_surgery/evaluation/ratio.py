"""The mean of something per token over windows of different lengths, with its standard error."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_per_token(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Return total / tokens and its standard error over windows; None where at most one window has tokens.

    Args:
        sums: [N] float64, the sum over each window.
        counts: [N], the tokens of each window; windows without any do not count.

    The mean is a ratio of sums. Its variance over windows is that of the ratio estimator (Cochran, Sampling
    Techniques, 1977, section 2.11).
    """
    counts = counts.double()
    windows, total = int((counts > 0).sum()), float(counts.sum())
    mean = float(sums.sum()) / total
    if windows < 2:
        return mean, None
    residuals = sums - mean * counts
    return mean, math.sqrt(windows / (windows - 1) * float(torch.sum(residuals**2)) / total**2)
