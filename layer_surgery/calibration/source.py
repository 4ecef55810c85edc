"""Sources of statistics: what a cache or another source has already, and the rest computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from layer_surgery import parallel
from layer_surgery.calibration.cache import StatisticsCache, statistics_steps
from layer_surgery.calibration.collector import collect
from layer_surgery.calibration.statistics import Ranks, Statistics, useful_ranks
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.journal import NOTHING_KEPT, Journal
from layer_surgery.records import Part
from layer_surgery.walk.walk import Walk, boundary_steps

_LOG = logging.getLogger(__name__)


class StatisticsSource:
    """Gives statistics: those of all layers from a cache or another source, else computed into a scratch folder."""

    def __init__(
        self,
        scratch: Path,
        dtype: torch.dtype,
        *,
        cache: Path | None = None,
        base_sha256: str = "",
        part: Part = "layer",
        maps: bool = False,
        note: Callable[[str], None] = lambda _text: None,
        journal: Journal = NOTHING_KEPT,
    ) -> None:
        """Compute into folders of `scratch`, or keep the statistics of all layers in a `cache`; see `StatisticsCache`.

        `dtype` is that of the stored components, `part` is what of the layers costs are measured for, and `maps` says
        whether linear maps for MLPs are among them. What a run was computing when it was stopped is in its `journal`.
        """
        self.part, self.maps = part, maps
        self._journal = journal
        self._scratch, self._dtype = scratch, dtype
        self._cache = None if cache is None else StatisticsCache(cache, base_sha256, note, maps=maps)
        self._trunk: StatisticsSource | None = None
        self._statistics: Statistics | None = None
        self._of_all_layers_failed = False

    def get(self, walk: Walk, layers: Mapping[int, Ranks]) -> Statistics:
        """Return statistics that hold at least these components."""
        if self._statistics is None:
            self._statistics = self._known(walk)
        known = self._statistics
        if known is None or not known.covers(layers):
            # A cache goes on having what this source forgets.
            wanted = layers if known is None or self._cache is not None else {**known.ranks, **layers}
            steps = statistics_steps(self._journal, wanted, self.part, self.maps)
            folder = steps.folder("components") or parallel.new_folder(self._scratch, "components-")
            computed = Statistics.empty(walk, FactorStore(folder, self._dtype))
            forward = boundary_steps(self._journal, walk)
            collect(walk, computed, wanted, self.part, maps=self.maps, forward=forward, steps=steps)
            self._statistics = known = computed
        return known

    def prepare(self, walk: Walk) -> None:
        """Compute the statistics of all layers now, so that branches need no walk for them; nothing if that fails."""
        self._of_all_layers(walk)

    def branch(self, scratch: Path) -> StatisticsSource:
        """Return a source for one of several users, each of which then gets what it would get alone.

        Its first statistics are those of all layers, which this source computes once. What they do not cover it
        computes for itself, into its own `scratch`.
        """
        other = StatisticsSource(scratch, self._dtype, part=self.part, maps=self.maps)
        other._cache, other._trunk = self._cache, self
        return other

    def _known(self, walk: Walk) -> Statistics | None:
        """Return the statistics of all layers that another source or the cache gives; None if neither does."""
        found = None if self._trunk is None else self._trunk._of_all_layers(walk)
        if found is None and self._cache is not None:
            found = self._cache.get(walk, self._scratch, self._dtype, self.part, self._journal)
            if found is None:
                self._cache = None
        return found

    def _of_all_layers(self, walk: Walk) -> Statistics | None:
        """Return the statistics of all layers, computed once; None if one of the layers does not allow it."""
        if self._statistics is None and not self._of_all_layers_failed:
            linears = useful_ranks(walk.model, range(walk.model.layer_count), self.part)
            try:
                self.get(walk, {index: ranks for index, ranks in linears.items() if ranks})
            except LayerSurgeryError as error:
                _LOG.debug("there are no statistics of all layers: %s", error)
                self._of_all_layers_failed = True
        return self._statistics
