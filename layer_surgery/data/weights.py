"""Weights of the sources of a mixture: `SOURCE[:WEIGHT]` taken apart, and sequences divided by weight."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from layer_surgery.config import CalibrationConfig
from layer_surgery.errors import DataError


@dataclass(frozen=True)
class WeightedSource:
    """One source of a mixture, as `load_documents` takes it, and its weight (finite, above 0)."""

    name: str
    weight: float = CalibrationConfig.DEFAULT_WEIGHT

    def __str__(self) -> str:
        return f"{self.name}:{self.weight:g}"


def weighted_sources(sources: Sequence[str], option: str = "--calibration") -> list[WeightedSource]:
    """Take each `SOURCE[:WEIGHT]` of an option apart and check that no source stands there twice.

    Only a number behind the last colon is a weight, and none is if a file of the whole name exists.

    Raises `DataError`: a weight that is no finite number above 0, or the same source twice.
    """
    seen: dict[str, WeightedSource] = {}
    for text in sources:
        source = _take_apart(text, option)
        identity = _identity(source.name)
        if identity in seen:
            first = seen[identity]
            both = WeightedSource(first.name, first.weight + source.weight)
            known_as = f" (first as '{first.name}')" if first.name != source.name else ""
            raise DataError(
                f"{option} names '{source.name}' more than once{known_as}; give it once, with a weight ({both})."
            )
        seen[identity] = source
    return list(seen.values())


def _take_apart(text: str, option: str) -> WeightedSource:
    name, colon, tail = text.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(text)):
        return WeightedSource(text)
    try:
        weight = float(tail)
    except ValueError:
        if os.path.isfile(os.path.expanduser(name)):
            raise DataError(
                f"{option} {text}: '{tail}' is not a weight, and there is no file of the whole name; give a "
                f"number above 0 behind the colon, such as {name}:2."
            ) from None
        return WeightedSource(text)  # the colon belongs to the name: C:\text.txt, OWNER/NAME@train[:1000]
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"{option} {text} has the weight {tail}; allowed: a finite number above 0.")
    return WeightedSource(name, weight)


def _identity(name: str) -> str:
    """One text for all ways to write the same file."""
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.exists(path) else name


def apportion(weights: Sequence[float], samples: int) -> list[int]:
    """Divide `samples` sequences by weight (largest remainder; of equal ones the first), at least one for each.

    A weight that is worth less than one sequence gets one, and the others share the rest. `samples` must be at least
    the number of weights; `CalibrationConfig` checks it.
    """
    exact = dict(enumerate(map(Fraction, weights)))
    shares = dict.fromkeys(exact, 1)
    while True:
        left = samples - (len(weights) - len(exact))
        quota = {position: weight * left / sum(exact.values()) for position, weight in exact.items()}
        above = {position: exact[position] for position in exact if quota[position] >= 1}
        if len(above) == len(exact):
            break
        exact = above
    shares |= {position: math.floor(value) for position, value in quota.items()}
    by_remainder = sorted(quota, key=lambda position: shares[position] - quota[position])
    for position in by_remainder[: samples - sum(shares.values())]:
        shares[position] += 1
    return [shares[position] for position in range(len(weights))]
