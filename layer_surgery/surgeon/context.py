"""What a surgical method is given, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from layer_surgery.calibration.cache import StatisticsSource
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.progress import Progress
from layer_surgery.records import SpectrumRecord, SurgeryPlan
from layer_surgery.registry import Registry
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk


@dataclass(frozen=True, kw_only=True)
class SurgeryContext:
    """The original model, the calibration walk over it (None if no method needs one), and where new tensors go."""

    model: StreamedModel
    walk: Walk | None
    factors: FactorStore
    statistics: StatisticsSource
    progress: Progress
    ranks_fixed: bool = False
    """Whether the ranks are the user's own, so that a method must not choose better ones."""
    spectra: list[SpectrumRecord] = field(default_factory=list)
    """Where methods that decompose linears leave their singular values, for the report."""


Method = Callable[[SurgeryPlan, SurgeryContext], SurgeryPlan]
"""Writes the factors of every low-rank layer of the plan, and new weights of other layers where it changes any, to
`context.factors`, and returns the plan as carried out: the same, or with other ranks within the same bound."""

METHODS: Registry[Method] = Registry("method")


def the_walk(context: SurgeryContext) -> Walk:
    """Return the calibration walk of a method that asked for data."""
    assert context.walk is not None, "a method that needs data is always given a walk"
    return context.walk
