"""`--dry-run`: what a compression will take, before any pass over its data."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

import attrs

from layer_surgery import parallel
from layer_surgery.config import CompressConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.progress import Stage
from layer_surgery.records.foresight import Foresight, StageForesight
from layer_surgery.runs.foresight import memory, seconds
from layer_surgery.runs.foresight.fits import check_memory
from layer_surgery.runs.foresight.healing_case import HealingCase
from layer_surgery.runs.foresight.healing_stages import ForeseenHealing
from layer_surgery.runs.foresight.probe import Rates, probe
from layer_surgery.runs.foresight.process import Process, means
from layer_surgery.runs.foresight.sizes import Sizes, sizes_of
from layer_surgery.runs.opening import Opened, check_options, open_compression
from layer_surgery.runs.planning import Planning, checked
from layer_surgery.runs.session import Model
from layer_surgery.runs.stages import (
    FISHER,
    PASSES_OF_METHODS,
    PASSES_OF_SCORERS,
    WITH_STATISTICS,
    stages_of_compression,
)

ADVICE = "choose an --output on another disk, or lower --samples"


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

    healing = _healing(opened, probed.sizes)

    def foreseen(sizes: Sizes, case: HealingCase | None = None) -> list[StageForesight]:
        found = list[StageForesight]()
        for stage in stages:
            if stage.name == "heal" and healing is not None:
                case = case or replace(healing.case, teacher=sizes, student=sizes)
                found += healing.stages(case, probed.process)
            else:
                found.append(probed.stage(stage, sizes, planning))
        return found

    def check(found: Foresight, available: int | None) -> None:
        more = []
        if healing is not None and available is not None and found.memory_bytes > available:
            more = healing.that_fit(available, lambda case: foreseen(case.teacher, case), prefix="--heal-")
        check_memory(found, probed.sizes, available, foreseen, more)

    files = healing.files() if healing is not None else {"": 0}
    scratch = scratch_bytes_of(probed.sizes, planning) + files.pop("")
    return probed.process.found(
        foreseen(probed.sizes),
        output=config.output,
        output_bytes=planning.trial.parameters * opened.session.checkpoint.dtype.itemsize,
        scratch_bytes=scratch,
        kept=healing.kept(files, "--heal-") if healing is not None else {},
        probed=means(probed.rates),
        left_out=left_out_of(config, planning) + (healing.left_out if healing is not None else []),
        check_memory=check,
        advice=ADVICE,
    )


def _healing(opened: Opened, sizes: Sizes) -> ForeseenHealing | None:
    """Return the healing that follows; the original stands for the result, which is not there yet."""
    if opened.healing is None:
        return None
    return ForeseenHealing.measure(
        opened.healing,
        opened.session,
        opened.session,
        opened.planning.trial,
        (sizes, sizes),
        known=lambda _tokens: 0,
        before_surgery=True,
    )


@dataclass(frozen=True)
class Probed:
    """An opened checkpoint with its sizes, what the probe of this machine has measured, and what the process takes."""

    process: Process
    sizes: Sizes
    rates: Rates | None  #: None without any data to pass through the layers.

    @classmethod
    def measure(cls, opened: Opened, config: CompressConfig) -> Self:
        """Probe this machine."""
        session, tokens, general = opened.session, opened.tokens, opened.general
        sizes = sizes_of(
            session,
            opened.texts,
            length=tokens.sequence_length if tokens is not None else config.sequence_length,
            calibration=tokens.sequences if tokens is not None else 0,
            general=general.sequences if general is not None else 0,
        )
        # What has no data at all looks at weights only: any tokens do to see what the process itself takes.
        some = tokens or next(iter(opened.texts), None)
        rates = _probed(opened, some, sizes) if some is not None else None
        return cls(Process.now(session), sizes, rates)

    def stage(self, stage: Stage, sizes: Sizes, planning: Planning, *, known: bool = False) -> StageForesight:
        """Return what a stage of a compression takes; `known` if there are statistics of all layers already."""
        working = _memory(stage.name, sizes, planning)
        taken = _seconds(stage.name, sizes, self.rates, planning, known=known)
        return self.process.stage(stage.name, stage.title, taken, working, sizes)


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
    # Saving holds one tensor at a time.
    return {"weights": max(layer.largest for layer in sizes.layers) * sizes.stored_itemsize}


def _seconds(name: str, sizes: Sizes, rates: Rates | None, planning: Planning, *, known: bool = False) -> float | None:
    """Return the seconds of a stage; None where they cannot be told before."""
    operated = [layer.index for layer in planning.trial.smaller]
    config, by_fisher = planning.config, planning.config.scorer == FISHER and planning.chooses
    if name == "save":
        return sum(rates.reading.values()) if rates is not None else None
    if rates is None:
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


def left_out_of(config: CompressConfig, planning: Planning) -> list[str]:
    """Return what the seconds do not hold, in words."""
    found = []
    if config.tasks or config.continuations or config.speed:
        found.append("tasks, continuations and speed")
    if config.heal is not None:
        found.append("what healing saves because the result is smaller than the original")
    if planning.chooses and PASSES_OF_SCORERS.get(config.scorer) is None:
        found.append(f"--scorer {config.scorer}, which tries layer by layer")
    if config.cache is not None:
        found.append("what --cache saves, if it holds the statistics already")
    return found
