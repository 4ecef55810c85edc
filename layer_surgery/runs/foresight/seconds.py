"""Seconds of every stage, from how often it passes the layers and what the probe has measured.

Numbers of passes are those of the code that they name. Where a stage cannot be told before, it has None.
"""

from __future__ import annotations

from collections.abc import Iterable

from layer_surgery.calibration.couplings import LEVELS
from layer_surgery.runs.foresight.probe import Rates
from layer_surgery.runs.foresight.sizes import Sizes

#: Of calibration sequences, those on which `calibration/couplings.py` runs changed layers: one in four.
_COUPLED = 1 / 4
#: Attention, MLP and, where there are any, experts are tried by themselves.
_PARTS = 2
#: Forward passes of either model, in passes through the whole layer, that `surgeon/refit.py` makes to re-solve a layer:
#: up to the projections of attention on both sides, to its output on both, to gate and up on both, through the result,
#: and once more behind it.
_REFIT_PASSES = 6.0


def evaluation(sizes: Sizes, rates: Rates, *, compared: bool) -> float:
    """Return the seconds of perplexity on all texts; `compared` with the distance from another model."""
    tokens = sum(count * length for count, length in sizes.texts)
    heads = 3 if compared else 1  # both models once more
    return tokens * (_all(rates.forward) + heads * rates.head) + len(sizes.texts) * _reads(sizes, rates)


def statistics(sizes: Sizes, rates: Rates) -> float:
    """Return the seconds of a walk forward and backward with the statistics of all layers."""
    tokens = sizes.calibration * sizes.length
    tried = (len(LEVELS) - 1 + _PARTS) * _COUPLED
    passes = _all(rates.forward) * (1 + tried) + _all(rates.backward) + _all(rates.moments) + rates.head_backward
    return tokens * passes + _all(rates.decompositions) + 2 * _reads(sizes, rates)


def forward(sizes: Sizes, rates: Rates, passes: float) -> float:
    """Return the seconds of so many passes over the calibration tokens."""
    return passes * (sizes.calibration * sizes.length * _all(rates.forward) + _reads(sizes, rates))


def decompositions(rates: Rates, layers: Iterable[int]) -> float:
    """Return the seconds of decomposing the linears of some layers."""
    return sum(rates.decompositions[index] for index in layers)


def refit(sizes: Sizes, rates: Rates, layers: Iterable[int]) -> float:
    """Return the seconds of re-solving these layers of the result."""
    solved = [*layers]
    tokens = (sizes.calibration + sizes.general) * sizes.length
    each = sum(_REFIT_PASSES * rates.forward[index] + rates.sums[index] for index in solved)
    heads = 2 * sizes.calibration * sizes.length * rates.head
    general = sizes.general * sizes.length * _all(rates.forward)
    reads = 0.0 if sizes.stay else 2 * sum(rates.reading[index] for index in solved)
    return tokens * each + sum(rates.solutions[index] for index in solved) + heads + general + reads


def _all(rates: dict[int, float]) -> float:
    return sum(rates.values())


def _reads(sizes: Sizes, rates: Rates) -> float:
    """Return the seconds of reading all layers, once at the most if they stay."""
    return 0.0 if sizes.stay else _all(rates.reading)
