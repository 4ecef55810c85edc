"""Rise of the loss to be expected of a refitted model, from the tokens that it was fitted to."""

from dataclasses import replace

from layer_surgery.evaluation.uncertainty import paired_difference
from layer_surgery.records import Interval
from layer_surgery.walk.walk import Losses

#: Rise on new text of the same kind over the rise on the tokens that a refit has seen.
OPTIMISM = 1.0


def expected_rise(before: Losses, after: Losses, seed: int) -> Interval | None:
    """Return the rise of the loss, nats per token, to be expected on text like the calibration data.

    That on the calibration tokens themselves, which a refit with few parameters for many tokens fits little better
    than others; how much is `OPTIMISM`. The interval is that of a paired bootstrap over the windows. None with fewer
    than two windows that carry loss.
    """
    if int((before.tokens > 0).sum()) < 2:
        return None
    rise = paired_difference((after.sums - before.sums).numpy(), before.tokens.double().numpy(), seed)
    return replace(rise, value=OPTIMISM * rise.value, low=OPTIMISM * rise.low, high=OPTIMISM * rise.high)
