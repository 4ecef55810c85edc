"""How long a healing is: steps and validations that a budget of tokens or of minutes comes to."""

from __future__ import annotations

import math

from layer_surgery.config import HealingConfig
from layer_surgery.healing.windows import HealingData

#: Share of the time left that training is planned for; the rest is for validation and what comes after it.
PLANNED_SHARE = 0.9
#: Most validations in a training; fewer where they would look at more than half as many windows as it trains on.
MOST_VALIDATIONS = 10
#: Share of the minutes after which no further learning rate is tried.
PROBE_SHARE = 0.1
#: Windows that the local stage trains on, steps for each layer, and its share of the minutes.
LOCAL_WINDOWS, LOCAL_STEPS, LOCAL_SHARE = 256, 48, 0.25


def steps_of_tokens(config: HealingConfig, data: HealingData) -> int:
    """Return the steps of a training on `--tokens`."""
    assert config.tokens is not None
    return max(1, math.ceil(config.tokens / (config.step_sequences * window_tokens(data))))


def window_tokens(data: HealingData) -> float:
    """Return the tokens of a window, of texts of different lengths the mean."""
    if data.train.objective.apart:  # most sequences are shorter than the longest
        return int(data.train.valid.sum()) / data.train.sequences
    return float(data.train.sequence_length)


def steps_in(left: float, data: HealingData, config: HealingConfig, *, asking: float, step: float) -> int:
    """Return the steps of a training in the time that is left.

    Args:
        left: seconds for asking the original, training and validation.
        asking: seconds that asking the original about a window takes.
        step: seconds of a step of the optimiser.
    """
    planned, asking = PLANNED_SHARE * left, asking * config.step_sequences
    # Of more steps than there are windows, the original is asked about those windows only.
    most = data.data_windows / config.step_sequences
    steps = planned / (asking + step)
    if steps > most:
        steps = (planned - most * asking) / step
    return max(1, int(steps))


def validations_of(steps: int, data: HealingData, config: HealingConfig) -> int:
    """Return how often a student is validated in a training of so many steps."""
    held_out = sum(text.sequences for text in data.texts.values())
    return min(MOST_VALIDATIONS, max(2, steps * config.step_sequences // (2 * held_out)))
