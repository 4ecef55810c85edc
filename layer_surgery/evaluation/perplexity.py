"""Perplexity over packed windows, with its standard error."""

import math
import sys

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import DataError, NumericalError
from layer_surgery.evaluation.uncertainty import mean_per_token
from layer_surgery.records import Perplexity
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Losses, Walk, WalkSettings


def window_losses(
    model: StreamedModel, tokens: PackedTokens, settings: WalkSettings, keep: Boundary | None = None
) -> Losses:
    """Return the loss of every window; one layer of the model is in memory at a time.

    Windows do not overlap, each token is predicted at most once and weighs the same. With `keep`, the last boundary is
    copied there. Raises `NumericalError` if the loss of any window is not finite.
    """
    with Walk(model, tokens, settings) as walk:
        last = walk.forward(range(model.layer_count), keep=False)
        losses = walk.losses(last)
        if keep is not None:
            for rows in walk.batches():
                keep.write(rows, last.read(rows))
    return losses


def summarise(losses: Losses, tokens: PackedTokens) -> Perplexity:
    """Return exp(total loss / predicted tokens) with its standard error, which the delta method takes through exp."""
    total = int(losses.tokens.sum())
    if total == 0:
        raise DataError(f"'{tokens.name}' has no token to predict.")
    mean, stderr = mean_per_token(losses.sums, losses.tokens)
    if mean > math.log(sys.float_info.max):
        raise NumericalError(f"the perplexity on '{tokens.name}' is too large to write down (loss {mean:.0f} nats).")
    value = math.exp(mean)
    return Perplexity(
        value=value,
        stderr=None if stderr is None else value * stderr,
        tokens=total,
        windows=int((losses.tokens > 0).sum()),
        sequence_length=tokens.sequence_length,
        data_sha256=tokens.sha256,
    )
