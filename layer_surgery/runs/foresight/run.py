"""`--dry-run`: what a compression will take, before any pass over its data."""

from __future__ import annotations

import gc
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

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
from layer_surgery.runs.session import Model
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
    session, original, planning = opened.session, opened.session.checkpoint, opened.planning
    sizes = sizes_of(opened, config)
    stages = stages_of_compression(
        planning,
        opened.texts,
        opened.tokens,
        scored=planning.chooses,
        saved=config.output is not None,
        healed=opened.healing is not None,
    )
    # What has no data at all looks at weights only: any tokens do to see what the process itself takes.
    some = opened.tokens or next(iter(opened.texts), None)
    rates = _probed(opened, some, sizes) if some is not None else None
    gc.collect()
    release_freed_memory()
    base = used_memory_bytes(session.device)

    def of(stage: Stage, sizes: Sizes) -> StageForesight:
        working = _memory(stage.name, sizes, planning)
        kept = memory.kept_by_allocator(working, sizes, given_back=frees_to_system(session.device))
        taken = {"the process": base} | working | kept
        return StageForesight(
            name=stage.name,
            title=stage.title,
            seconds=_seconds(stage.name, sizes, rates, planning),
            memory_bytes=sum(taken.values()),
            parts=taken,
        )

    free = available_memory_bytes(session.device)
    limit = session.runtime.memory_limit
    output, scratch = config.output, session.runtime.scratch or _scratch_parent(config.output)
    found = Foresight(
        model=original.name,
        device=str(session.device),
        dtype=str(session.dtype).removeprefix("torch."),
        stages=[of(stage, sizes) for stage in stages],
        memory_available_bytes=limit if limit is not None else None if free is None else free + base,
        output_bytes=planning.trial.parameters * original.dtype.itemsize,
        output_free_bytes=shutil.disk_usage(existing(output or scratch)).free,
        scratch_bytes=_scratch_bytes(sizes, planning),
        scratch_free_bytes=shutil.disk_usage(existing(scratch)).free,
        probed=_means(rates) if rates is not None else {},
        left_out=_left_out(config, planning),
    )
    check_memory(found, sizes, found.memory_available_bytes, lambda other: [of(stage, other) for stage in stages])
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


def _seconds(name: str, sizes: Sizes, rates: Rates | None, planning: Planning) -> float | None:
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
            return seconds.statistics(sizes, rates)
        passes = PASSES_OF_SCORERS.get(config.scorer)
        return None if passes is None else seconds.forward(sizes, rates, passes)
    passes = PASSES_OF_METHODS.get(planning.method.name)
    if planning.method.name in WITH_STATISTICS:
        return seconds.forward(sizes, rates, 1) + (0.0 if by_fisher else seconds.statistics(sizes, rates))
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


def _scratch_bytes(sizes: Sizes, planning: Planning) -> int:
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


def _left_out(config: CompressConfig, planning: Planning) -> list[str]:
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
