"""Rise of the loss to be expected of a refitted model, from the tokens that it was fitted to."""

from layer_surgery.evaluation.uncertainty import paired_difference
from layer_surgery.records import Interval
from layer_surgery.walk.walk import Losses


def expected_rise(before: Losses, after: Losses, seed: int) -> Interval | None:
    """Return the rise of the loss, nats per token, to be expected on text like the calibration data.

    That on the calibration tokens themselves: a refit fits few numbers to many tokens, so new text of the same kind
    shows nearly the same (reports/task_aware/sizes.md). The interval is that of a paired bootstrap over the windows.
    None with fewer than two windows that carry loss.
    """
    if int((before.tokens > 0).sum()) < 2:
        return None
    return paired_difference((after.sums - before.sums).numpy(), before.tokens.double().numpy(), seed)
