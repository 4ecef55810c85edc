"""`--dry-run`: what a compression will take, before any pass over its data."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import attrs

from layer_surgery import parallel
from layer_surgery.config import CompressConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.devices import available_memory_bytes, frees_to_system, used_memory_bytes
from layer_surgery.machine import release_freed_memory
from layer_surgery.progress import Stage
from layer_surgery.records.foresight import Foresight, StageForesight
from layer_surgery.runs.foresight import memory, seconds
from layer_surgery.runs.foresight.fits import check_disk, check_memory, existing
from layer_surgery.runs.foresight.probe import Rates, probe
from layer_surgery.runs.foresight.sizes import Sizes, layer_sizes, sequences_of
from layer_surgery.runs.opening import Opened, check_options, open_compression
from layer_surgery.runs.planning import Planning, checked
from layer_surgery.runs.session import Model, Session
from layer_surgery.runs.stages import (
    FISHER,
    PASSES_OF_METHODS,
    PASSES_OF_SCORERS,
    WITH_STATISTICS,
    stages_of_compression,
)


def run_foresee(model: Model, config: CompressConfig) -> Foresight:
    """Say what a compression will take. Raises what the compression would refuse, and `UserError` if it cannot fit."""
    config = attrs.evolve(checked(config), no_save=True)
    parallel.check_alone("--dry-run")
    check_options(config)
    with ExitStack() as stack:
        opened = open_compression(model, config, stack)
        return _foresee(opened, config)


def _foresee(opened: Opened, config: CompressConfig) -> Foresight:
    planning = opened.planning
    probed = Probed.measure(opened, config)
    stages = stages_of_compression(
        planning,
        opened.texts,
        opened.tokens,
        scored=planning.chooses,
        saved=config.output is not None,
        healed=opened.healing is not None,
    )

    def foreseen(sizes: Sizes) -> list[StageForesight]:
        return [probed.stage(stage, sizes, planning) for stage in stages]

    return probed.found(
        foreseen,
        output=config.output,
        output_bytes=planning.trial.parameters * opened.session.checkpoint.dtype.itemsize,
        scratch_bytes=scratch_bytes_of(probed.sizes, planning),
        left_out=left_out_of(config, planning),
    )


@dataclass(frozen=True)
class Probed:
    """An opened checkpoint with its sizes, what the probe of this machine has measured, and what the process takes."""

    session: Session
    sizes: Sizes
    rates: Rates | None  #: None without any data to pass through the layers.
    base: int  #: Bytes that the process has anyway.

    @classmethod
    def measure(cls, opened: Opened, config: CompressConfig) -> Self:
        """Probe this machine."""
        session, sizes = opened.session, sizes_of(opened, config)
        # What has no data at all looks at weights only: any tokens do to see what the process itself takes.
        some = opened.tokens or next(iter(opened.texts), None)
        rates = _probed(opened, some, sizes) if some is not None else None
        gc.collect()
        release_freed_memory()
        return cls(session, sizes, rates, used_memory_bytes(session.device))

    def stage(self, stage: Stage, sizes: Sizes, planning: Planning, *, known: bool = False) -> StageForesight:
        """Return what a stage of a compression takes; `known` if there are statistics of all layers already."""
        working = _memory(stage.name, sizes, planning)
        taken = _seconds(stage.name, sizes, self.rates, planning, known=known)
        return self.with_process(stage.name, stage.title, taken, working, sizes)

    def with_process(
        self, name: str, title: str, taken: float | None, working: memory.Parts, sizes: Sizes
    ) -> StageForesight:
        """Return a stage of so many seconds with the memory of the process beside its own."""
        kept = memory.kept_by_allocator(working, sizes, given_back=frees_to_system(self.session.device))
        parts = {"the process": self.base} | working | kept
        return StageForesight(name=name, title=title, seconds=taken, memory_bytes=sum(parts.values()), parts=parts)

    def found(
        self,
        foreseen: Callable[[Sizes], list[StageForesight]],
        *,
        output: Path | None,
        output_bytes: int,
        scratch_bytes: int,
        left_out: list[str],
    ) -> Foresight:
        """Return the whole; raises `UserError` if it does not fit. `foreseen` gives the stages for other sizes too."""
        session = self.session
        free, limit = available_memory_bytes(session.device), session.runtime.memory_limit
        scratch = session.runtime.scratch or _scratch_parent(output)
        found = Foresight(
            model=session.checkpoint.name,
            device=str(session.device),
            dtype=str(session.dtype).removeprefix("torch."),
            stages=foreseen(self.sizes),
            memory_available_bytes=limit if limit is not None else None if free is None else free + self.base,
            output_bytes=output_bytes,
            output_free_bytes=shutil.disk_usage(existing(output or scratch)).free,
            scratch_bytes=scratch_bytes,
            scratch_free_bytes=shutil.disk_usage(existing(scratch)).free,
            probed=_means(self.rates) if self.rates is not None else {},
            left_out=left_out,
        )
        check_memory(found, self.sizes, found.memory_available_bytes, foreseen)
        check_disk(found, output, scratch)
        return found


def sizes_of(opened: Opened, config: CompressConfig) -> Sizes:
    """Return the sizes that a compression comes to."""
    session, original, tokens, general = opened.session, opened.session.checkpoint, opened.tokens, opened.general
    layers = layer_sizes(original)
    return Sizes(
        layers=layers,
        outside=original.parameters - sum(layer.parameters for layer in layers),
        hidden=original.hidden_size,
        vocabulary=original.vocabulary_size,
        dtype=session.dtype,
        stored_itemsize=original.dtype.itemsize,
        batch_size=config.batch_size,
        length=tokens.sequence_length if tokens is not None else config.sequence_length,
        calibration=tokens.sequences if tokens is not None else 0,
        general=general.sequences if general is not None else 0,
        texts=sequences_of(opened.texts),
        decomposition=config.decomposition,
        resident_bytes=session.resident_bytes,
        boundary_bytes=session.boundary_bytes,
        ahead_bytes=session.ahead_bytes,
    )


def _probed(opened: Opened, tokens: PackedTokens, sizes: Sizes) -> Rates:
    session = opened.session
    session.ui.note("probing this machine: a layer of each kind, one micro-batch, a decomposition of each size")
    return probe(session.stream(session.checkpoint), tokens, sizes, session.settings)


def _memory(name: str, sizes: Sizes, planning: Planning) -> memory.Parts:
    """Return the memory of a stage beside what the process has anyway."""
    if name in ("evaluate_before", "evaluate_after", "evaluate_unhealed"):
        return memory.evaluation(sizes, compared=name != "evaluate_before")
    if name == "refit":
        return memory.refit(sizes)
    if name in ("score", "operate"):
        return memory.statistics(sizes) if _takes_statistics(planning) else memory.forward(sizes)
    # Saving holds one tensor at a time; healing has budgets of its own.
    return {"weights": max(layer.largest for layer in sizes.layers) * sizes.stored_itemsize}


def _seconds(name: str, sizes: Sizes, rates: Rates | None, planning: Planning, *, known: bool = False) -> float | None:
    """Return the seconds of a stage; None where they cannot be told before."""
    operated = [layer.index for layer in planning.trial.smaller]
    config, by_fisher = planning.config, planning.config.scorer == FISHER and planning.chooses
    if name == "save":
        return sum(rates.reading.values()) if rates is not None else None
    if rates is None or name == "heal":
        return None
    if name in ("evaluate_before", "evaluate_after", "evaluate_unhealed"):
        return seconds.evaluation(sizes, rates, compared=name != "evaluate_before")
    if name == "refit":
        return seconds.refit(sizes, rates, _refitted(planning))
    if name == "score":
        if by_fisher:
            return 0.0 if known else seconds.statistics(sizes, rates)
        passes = PASSES_OF_SCORERS.get(config.scorer)
        return None if passes is None else seconds.forward(sizes, rates, passes)
    passes = PASSES_OF_METHODS.get(planning.method.name)
    if planning.method.name in WITH_STATISTICS:
        return seconds.forward(sizes, rates, 1) + (0.0 if by_fisher or known else seconds.statistics(sizes, rates))
    if passes is None:
        return seconds.decompositions(rates, operated) if not planning.method.needs_data else None
    return seconds.forward(sizes, rates, passes) + seconds.decompositions(rates, operated)


def _takes_statistics(planning: Planning) -> bool:
    gradients = planning.method.name in (*WITH_STATISTICS, "grasp")
    return gradients or (planning.chooses and planning.config.scorer in (FISHER, "taylor"))


def _refitted(planning: Planning) -> list[int]:
    """Return the layers that a refit re-solves: behind the first cut all, or those that are smaller."""
    smaller = [layer.index for layer in planning.trial.smaller]
    if planning.refit_scope == "operated":
        return smaller
    cut = [layer.index for layer in planning.trial.layers if layer.action != "keep"]
    gone = {layer.index for layer in planning.trial.layers if layer.action == "remove"}
    first = min(cut, default=0)
    return [index for index in range(first, len(planning.trial.layers)) if index not in gone]


def scratch_bytes_of(sizes: Sizes, planning: Planning) -> int:
    """Return what scratch files take at most: boundaries, components of all layers, what was solved."""
    written = planning.trial.parameters * sizes.stored_itemsize
    components = memory.components_bytes(sizes) if _takes_statistics(planning) else 0
    return memory.boundary_files_bytes(sizes) + components + written * (2 if planning.refit_scope else 1)


def _scratch_parent(output: Path | None) -> Path:
    return output.parent if output is not None else Path(tempfile.gettempdir())


def _means(rates: Rates) -> dict[str, float]:
    """Return what was measured, for a mean layer."""
    found = dict[str, float]()
    for name, value in asdict(rates).items():
        found[name] = value if isinstance(value, float) else sum(value.values()) / max(1, len(value))
    return found


def left_out_of(config: CompressConfig, planning: Planning) -> list[str]:
    """Return what the seconds do not hold, in words."""
    found = []
    if config.tasks or config.continuations or config.speed:
        found.append("tasks, continuations and speed")
    if config.heal is not None:
        found.append("healing")
    if planning.chooses and PASSES_OF_SCORERS.get(config.scorer) is None:
        found.append(f"--scorer {config.scorer}, which tries layer by layer")
    if config.cache is not None:
        found.append("what --cache saves, if it holds the statistics already")
    return found
