"""`sweep --dry-run`: what the points that are missing will take, before any pass over the data."""

from __future__ import annotations

from contextlib import ExitStack

import attrs

from layer_surgery import parallel
from layer_surgery.config import SweepConfig
from layer_surgery.records.foresight import Foresight, StageForesight
from layer_surgery.records.reading import read_sweep
from layer_surgery.records.sweep import SweepSettings
from layer_surgery.runs.foresight import memory, seconds
from layer_surgery.runs.foresight.fits import check_memory
from layer_surgery.runs.foresight.process import means
from layer_surgery.runs.foresight.run import ADVICE as ADVICE_OF_DISKS
from layer_surgery.runs.foresight.run import Probed, left_out_of, scratch_bytes_of
from layer_surgery.runs.foresight.sizes import Sizes
from layer_surgery.runs.opening import Opened, check_options, open_compression
from layer_surgery.runs.planning import Planning
from layer_surgery.runs.session import Model
from layer_surgery.runs.stages import FISHER, stages_of_compression
from layer_surgery.runs.sweep.condition import parse_condition
from layer_surgery.runs.sweep.grid import compress_config, grid, same_surgery
from layer_surgery.runs.sweep.run import ADVICE
from layer_surgery.runs.sweep.sharing import different, need_statistics
from layer_surgery.runs.sweep.state import check_best, check_sweep_directory


def run_foresee_sweep(model: Model, config: SweepConfig) -> Foresight:
    """Say what a sweep will take. Raises what the sweep would refuse, and `UserError` if it cannot fit."""
    parallel.check_alone("--dry-run")
    points = grid(config)
    if config.best is not None:
        parse_condition(config.best, config)
        check_best(config.directory)
    check_sweep_directory(config.directory)
    missing = _missing(points, config)
    configs = [compress_config(config, point) for point in missing or points]
    for each in configs:
        check_options(each)
    # The point that asks for most data opens them for all.
    widest = max(configs, key=lambda each: bool(each.refit))
    with ExitStack() as stack:
        opened = open_compression(model, attrs.evolve(widest, continuations=0, prompts=()), stack)
        session = opened.session
        plannings = [Planning(each, session.checkpoint, session.device) for each in configs]
        probed = Probed.measure(opened, widest)
        largest = max(planning.trial.parameters for planning in plannings)
        left_out = sorted({words for planning in plannings for words in left_out_of(planning.config, planning)})
        if config.best is not None:
            left_out.append("saving the --best")
        statistics = need_statistics(missing)

        def foreseen(sizes: Sizes) -> list[StageForesight]:
            begin = stages_of_compression(plannings[0], opened.texts, opened.tokens, scored=False, saved=False)[0]
            stages = [probed.stage(begin, sizes, plannings[0])] if missing else []
            if statistics:
                taken = seconds.statistics(sizes, probed.rates) if probed.rates is not None else None
                working = memory.statistics(sizes)
                stages.append(probed.process.stage("statistics", "statistics of all layers", taken, working, sizes))
            each = zip(missing, plannings, strict=False)
            return stages + [_point(probed, point, planning, sizes, opened) for point, planning in each]

        return probed.process.found(
            foreseen(probed.sizes),
            output=config.directory,
            output_bytes=largest * session.checkpoint.dtype.itemsize if config.best is not None else 0,
            scratch_bytes=max(scratch_bytes_of(probed.sizes, planning) for planning in plannings),
            probed=means(probed.rates),
            left_out=left_out,
            check_memory=lambda found, available: check_memory(found, probed.sizes, available, foreseen),
            advice=ADVICE_OF_DISKS,
        )


def _missing(points: list[SweepSettings], config: SweepConfig) -> list[SweepSettings]:
    """Return the first of all points that give the same model, without those whose model is measured already."""
    known = None if config.overwrite else read_sweep(config.directory, ADVICE)
    done = {same_surgery(point.settings) for point in known.points if point.status == "done"} if known else set()
    return [point for point in different(points) if same_surgery(point) not in done]


def _point(probed: Probed, settings: SweepSettings, planning: Planning, sizes: Sizes, opened: Opened) -> StageForesight:
    """Return what one point takes: the seconds of its stages together, and the memory of the one that takes most."""
    stages = stages_of_compression(
        planning, opened.texts, opened.tokens, scored=planning.chooses and planning.config.scorer != FISHER, saved=False
    )
    found = [probed.stage(stage, sizes, planning, known=True) for stage in stages[1:]]
    most = max(found, key=lambda stage: stage.memory_bytes)
    known = [stage.seconds for stage in found]
    taken = None if None in known else sum(each for each in known if each is not None)
    return StageForesight(
        name=settings.name, title=settings.name, seconds=taken, memory_bytes=most.memory_bytes, parts=most.parts
    )
