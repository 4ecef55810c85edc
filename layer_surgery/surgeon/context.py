"""The input of a surgical method, and the registry of methods."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from layer_surgery import parallel
from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.config import SearchConfig
from layer_surgery.config.choices import METHOD_CHOICES
from layer_surgery.journal import NO_STEPS, NOTHING_KEPT, Finished, Journal, Steps
from layer_surgery.linalg.low_rank import Factors
from layer_surgery.progress import Progress
from layer_surgery.records import SpectrumMetric, SpectrumRecord, SurgeryPlan, UnitName
from layer_surgery.registry import Registry
from layer_surgery.surgeon.resources import Pricing
from layer_surgery.surgeon.spectra import Kept, spectrum_record
from layer_surgery.walk.observer import Observer
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk, boundary_steps

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SurgeryContext:
    """The calibration walk over the original model, and where new tensors go."""

    walk: Walk
    factors: FactorStore  #: For what the method makes.
    statistics: StatisticsSource
    ranks_fixed: bool = False  #: Whether the ranks are the user's own, so that a method must not choose better ones.
    search: SearchConfig = field(default_factory=SearchConfig)
    """For methods that search: what may be cut, and in which steps."""
    pricing: Pricing = field(default_factory=Pricing)  #: For methods that search: what it takes.
    rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Where methods that narrow linears leave, by layer and linear, the rows [n] int64 that stay, for the refit."""
    spectra: list[SpectrumRecord] = field(default_factory=list)
    """Where methods that decompose linears leave their singular values, for the report."""
    steps: Steps = NO_STEPS  #: Of this surgery; `factors` are in one of their folders.
    journal: Journal = NOTHING_KEPT  #: Of the run.

    def write_alike(self, layer: int, linear: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that all processes have computed alike; what the first cannot write, all refuse."""
        with parallel.together():
            if parallel.is_first():
                self.factors.write_tensors(layer, linear, tensors)

    def unfinished(self, items: Iterable[T], name: Callable[[T], str]) -> Iterator[T]:
        """Yield the items whose step an earlier run has not finished; each is when the next is asked for."""
        for item in items:
            step = self.steps.find(name(item))
            if step is not None:
                self.restore(step.record)
                continue
            before = len(self.spectra)
            yield item
            self.steps.finish(name(item), self.record_since(before))

    def record_since(self, spectra: int, layer: int | None = None) -> dict[str, Any]:
        """Return what `restore` needs of a step that began with so many spectra, and that has narrowed a layer."""
        rows = {} if layer is None else {name: rows.tolist() for name, rows in self.rows.get(layer, {}).items()}
        return {"spectra": [asdict(each) for each in self.spectra[spectra:]], "layer": layer, "rows": rows}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Take from an earlier run what a step has left beside its tensors."""
        self.spectra.extend(SpectrumRecord(**each) for each in record["spectra"])
        if record["layer"] is not None:
            rows = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in record["rows"].items()}
            self.rows.setdefault(record["layer"], {}).update(rows)

    @property
    def boundaries(self) -> Steps:
        """Where the walk over the original keeps the boundaries behind its layers."""
        return boundary_steps(self.journal, self.walk)

    def write(
        self, layer: int, linear: str, factors: Factors, metric: SpectrumMetric, values: Sequence[float], kept: Kept
    ) -> None:
        """Write the factors of a linear, and for the report its singular values; see `spectrum_record`."""
        self.factors.write(layer, {linear: factors})
        self.spectra.append(spectrum_record(layer, linear, metric, values, kept))

    def record_units(self, layer: int, linear: str, units: UnitName, gains: Sequence[float], kept: int) -> None:
        """Keep, for the report, what units before an output projection are worth, in the order of choice.

        As singular values are: leaving out a component costs `1/2 value^2`.
        """
        values = [(2 * gain) ** 0.5 for gain in gains]
        self.spectra.append(spectrum_record(layer, linear, "fisher", values, kept, units))

    def record_map(self, layer: int, module: str, values: Sequence[float], kept: int) -> None:
        """Keep, for the report, the singular values of a linear map that takes the place of a module."""
        self.spectra.append(spectrum_record(layer, module, "fisher", values, kept, "bypass"))

    @contextmanager
    def divided(self, costs: Mapping[str, float], owner_of: Mapping[str, int] | None = None) -> Iterator[list[str]]:
        """Yield which of some linears this process is to write; on exit, all are there, and all spectra known.

        Args:
            costs: of each linear, by which they are shared out.
            owner_of: the process of each linear, if that is decided already.
        """
        owner_of, before = owner_of or parallel.owners(costs), len(self.spectra)
        with parallel.together():
            yield parallel.own(owner_of, costs)
        if parallel.group().world == 1:
            return
        found = [
            [SpectrumRecord(**record) for record in records]
            for records in parallel.gather([asdict(record) for record in self.spectra[before:]])
        ]
        self.spectra[before:] = [record for name in costs for record in found[owner_of[name]] if record.linear == name]

    @property
    def model(self) -> StreamedModel:
        """The original."""
        return self.walk.model

    @property
    def progress(self) -> Progress:
        return self.walk.settings.progress


class SurgeryObserver(Observer):
    """An observer that writes what takes the place of a layer, so that a walk can go on behind that layer."""

    context: SurgeryContext
    _spectra: int  #: How many there were when the last step was finished.

    def work_in(self, context: SurgeryContext) -> None:
        self.context, self._spectra = context, len(context.spectra)

    def finish(self, index: int, steps: Steps, passing: Callable[[Path], object]) -> None:
        steps.finish(str(index), self.context.record_since(self._spectra, index), passing=passing)
        self._spectra = len(self.context.spectra)

    def restore(self, index: int, step: Finished) -> None:
        self.context.restore(step.record)
        self._spectra = len(self.context.spectra)


Method = Callable[[SurgeryPlan, SurgeryContext], SurgeryPlan]
"""Writes the factors of every low-rank layer of the plan, and new weights of other layers where it changes any, to
`context.factors`, and returns the plan as carried out: the same, or with other ranks within the same bound."""


@dataclass(frozen=True)
class MethodEntry:
    """A method that can be chosen by name."""

    function: Method
    name: str
    _: KW_ONLY
    needs_data: bool = False  #: Whether it looks at calibration data.
    moments: bool = False  #: Whether it takes second moments, of as many tokens as the model is wide or more.
    needs_boundaries: bool = False  #: Whether it reads the hidden states at all layer boundaries.
    removes: bool = False
    """Whether the layers are removed and nothing of them is kept, so that there is no budget to spend."""
    behind: bool = False  #: Whether it puts something into the layer before each removed run; the first must then stay.
    refits: bool = False  #: Whether a refit follows unless the user says otherwise.
    searches: bool = False
    """Whether it finds out itself what stays of which layer, under any budgets; else it is given ranks."""


METHODS = Registry("method", MethodEntry, METHOD_CHOICES)
