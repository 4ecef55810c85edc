"""A difference or ratio of two models with its interval."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A paired difference (after - before) or ratio (after / before) with its bootstrap confidence interval."""

    value: float
    low: float
    high: float
    confidence: float
    pairs: int  #: Windows or items that both models were measured on.
