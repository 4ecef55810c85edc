"""Spectra for reports: few enough numbers to be kept beside a checkpoint, enough of them to draw the curve."""

import math
from collections.abc import Collection, Sequence
from typing import Literal

from layer_surgery.records import SpectrumMetric, SpectrumRecord, UnitName

#: How many components were kept, if the first; else the indices of those that were, from 0 on.
Kept = int | Collection[int]
#: Singular values that are kept of a spectrum.
MAX_POINTS = 48


def spectrum_record(
    layer: int,
    linear: str,
    metric: SpectrumMetric,
    values: Sequence[float],
    kept: Kept,
    units: UnitName | Literal[""] = "",
) -> SpectrumRecord:
    """Return what a report keeps of all singular values of a linear, in descending order; or of its `units`."""
    leading = isinstance(kept, int)
    chosen = set(range(kept)) if isinstance(kept, int) else set(kept)
    shown = log_spaced(len(values), MAX_POINTS)
    squares = [value**2 for value in values]
    whole = math.fsum(squares)
    return SpectrumRecord(
        layer=layer,
        linear=linear,
        metric=metric,
        total=len(values),
        rank=len(chosen),
        kept_share=round(math.fsum(squares[index] for index in chosen) / whole, 6) if whole else 0.0,
        components=[index + 1 for index in shown],
        values=[float(f"{values[index]:.4g}") for index in shown],
        kept=[] if leading else [index in chosen for index in shown],
        units=units,
    )


def log_spaced(total: int, most: int) -> list[int]:
    """Return at most `most` indices below `total`, the first and the last among them, evenly spaced in their logarithm.

    Where that would name an index twice, as at the beginning, the next one is taken.
    """
    if total <= most:
        return list(range(total))
    indices: list[int] = []
    for step in range(most):
        ideal = round(total ** (step / (most - 1))) - 1
        indices.append(max(ideal, indices[-1] + 1) if indices else 0)
    indices[-1] = total - 1
    return indices
