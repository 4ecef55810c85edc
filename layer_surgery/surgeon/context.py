"""What a surgical method is given, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layer_surgery.records import SurgeryPlan
from layer_surgery.registry import Registry
from layer_surgery.streaming import StreamedModel
from layer_surgery.surgeon.factors import FactorStore
from layer_surgery.walk import Progress, Walk


@dataclass(frozen=True, kw_only=True)
class SurgeryContext:
    """The original model, the calibration walk over it (None if no method needs one), and where factors go."""

    model: StreamedModel
    walk: Walk | None
    factors: FactorStore
    progress: Progress


Method = Callable[[SurgeryPlan, SurgeryContext], None]
"""Writes the factors of every low-rank layer of the plan to `context.factors`."""

METHODS: Registry[Method] = Registry("method")
