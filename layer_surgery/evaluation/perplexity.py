"""Perplexity over packed windows, with its standard error."""

from __future__ import annotations

import math
import sys

import torch

from layer_surgery.errors import DataError, NumericalError
from layer_surgery.records import Perplexity
from layer_surgery.streaming import StreamedModel
from layer_surgery.tokens import PackedTokens
from layer_surgery.walk import Losses, Walk, WalkSettings


def perplexity(model: StreamedModel, tokens: PackedTokens, settings: WalkSettings) -> Perplexity:
    """Return exp(total loss / predicted tokens) over all windows; one layer of the model is in memory at a time.

    Windows do not overlap, each token is predicted at most once and weighs the same.
    Raises `NumericalError` if the loss of any window is not finite.
    """
    with Walk(model, tokens, settings) as walk:
        slot = walk.forward(list(range(model.layer_count)), keep=False)
        losses = walk.losses(slot)
    return summarise(losses, tokens)


def summarise(losses: Losses, tokens: PackedTokens) -> Perplexity:
    """Return the perplexity with its standard error.

    The mean loss is a ratio of sums over windows, L / T. Its variance over windows is that of the ratio estimator
    (Cochran, Sampling Techniques, 1977, section 2.11), and the delta method takes it through exp.
    """
    counts = losses.tokens.double()
    windows, total = int((counts > 0).sum()), float(counts.sum())
    if total == 0:
        raise DataError(f"'{tokens.name}' has no token to predict.")
    mean = float(losses.sums.sum()) / total
    if mean > math.log(sys.float_info.max):
        raise NumericalError(f"the perplexity on '{tokens.name}' is too large to write down (loss {mean:.0f} nats).")
    value = math.exp(mean)
    stderr = None
    if windows > 1:
        residuals = losses.sums - mean * counts
        variance = windows / (windows - 1) * float(torch.sum(residuals**2)) / total**2
        stderr = value * math.sqrt(variance)
    return Perplexity(
        value=value,
        stderr=stderr,
        tokens=int(total),
        windows=windows,
        sequence_length=tokens.sequence_length,
        data_sha256=tokens.sha256,
    )
