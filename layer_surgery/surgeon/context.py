"""The input of a surgical method, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.progress import Progress
from layer_surgery.records import SpectrumRecord, SurgeryPlan
from layer_surgery.registry import Registry
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk


@dataclass(frozen=True, kw_only=True)
class SurgeryContext:
    """The calibration walk over the original model, and where new tensors go."""

    walk: Walk
    factors: FactorStore
    """For what the method makes."""
    statistics: StatisticsSource
    ranks_fixed: bool = False
    """Whether the ranks are the user's own, so that a method must not choose better ones."""
    spectra: list[SpectrumRecord] = field(default_factory=list)
    """Where methods that decompose linears leave their singular values, for the report."""

    @property
    def model(self) -> StreamedModel:
        """The original."""
        return self.walk.model

    @property
    def progress(self) -> Progress:
        return self.walk.settings.progress


Method = Callable[[SurgeryPlan, SurgeryContext], SurgeryPlan]
"""Writes the factors of every low-rank layer of the plan, and new weights of other layers where it changes any, to
`context.factors`, and returns the plan as carried out: the same, or with other ranks within the same bound."""


@dataclass(frozen=True)
class MethodEntry:
    """A method that can be chosen by name."""

    function: Method
    name: str
    summary: str = field(kw_only=True)
    """One line for help texts."""
    source: str = field(default="", kw_only=True)
    """URL of the paper, or "" where there is none."""
    needs_data: bool = field(default=False, kw_only=True)
    """Whether it looks at calibration data."""
    needs_boundaries: bool = field(default=False, kw_only=True)
    """Whether it reads the hidden states at all layer boundaries."""
    removes: bool = field(default=False, kw_only=True)
    """Whether the layers are removed and nothing of them is kept, so that there is no budget to spend."""
    refits: bool = field(default=False, kw_only=True)
    """Whether a refit follows unless the user says otherwise."""


METHODS = Registry("method", MethodEntry)
