"""The main job, top to bottom: open, calibrate, score, plan, operate, evaluate, save."""

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from layer_surgery import parallel
from layer_surgery.calibration.cache import check_cache
from layer_surgery.checkpoint.save import (
    check_free_space,
    check_not_same,
    check_output,
    check_saved,
    save_checkpoint,
    staged_directory,
    write_json,
)
from layer_surgery.config import CompressConfig
from layer_surgery.errors import OutputError, PlanError, describe
from layer_surgery.machine import peak_device_memory_bytes, peak_memory_bytes
from layer_surgery.records import LayerScores, StageFailure, SurgeryReport
from layer_surgery.records.reading import REPORT_FILE
from layer_surgery.reporting.publish import write_page_and_card
from layer_surgery.runs.bench import Result, general_text, open_bench
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.planning import Planning, checked
from layer_surgery.runs.provenance import (
    base_model_record,
    checkpoint_hash,
    described_tokens,
    report_dict,
    run_provenance,
)
from layer_surgery.runs.session import Model, Session, check_sources, open_session

_LOG = logging.getLogger(__name__)


def run_compress(model: Model, config: CompressConfig, *, known_scores: LayerScores | None = None) -> SurgeryReport:
    """Compress a model. Everything that can be refused is refused before any work is done.

    `known_scores` are what the scorer has given for the same options before; it is then not asked again.
    """
    config = checked(config)
    if config.output is None and not config.dry_run:
        raise OutputError("give --output (a directory for the compressed model), or --dry-run.")
    check_cache(config.cache)
    check_sources(config.text_column, calibration=config.calibration, evaluation=config.eval_data)
    with ExitStack() as stack:
        # Open: the output, the model, the data, and what there is to measure.
        staging = _open_output(model, config, stack)
        session = stack.enter_context(open_session(model, config, staging.parent if staging else None))
        original = session.checkpoint
        planning = Planning(config, original, session.device)
        if staging is not None and parallel.is_first():
            check_free_space(staging, planning.trial.parameters * original.dtype.itemsize)
        scope, tokens, general = planning.refit_scope, None, None
        if planning.needs_data:
            tokens = session.calibration_tokens(config)
            general = general_text(session, tokens, config.refit_general) if scope is not None else None
        evaluator = stack.enter_context(Evaluator(session, config, session.evaluation_tokens(config), baseline=session))
        session.stream(original)  # proves, before anything else is done, that it can be walked over
        sha256 = checkpoint_hash(session)
        _check_plan_is_for(config, sha256)
        # Evaluate the original.
        with session.clock.stage("evaluate_before"):
            evaluator.measure("before", original)
        # Calibrate, score, plan, operate.
        with open_bench(
            session,
            tokens,
            config,
            part=config.remove,
            maps=planning.needs_maps,
            general=general,
            base_sha256=sha256,
        ) as bench:
            scores = known_scores
            if scores is None and planning.chooses:
                scores = bench.scores(**planning.ranking)
            result = bench.operate(planning.plan(scores, sha256), **planning.surgery)
        # Evaluate the result.
        with session.clock.stage("evaluate_after"):
            evaluator.measure("after", result.checkpoint)
            comparison = evaluator.compare()
            device_peak = peak_device_memory_bytes(session.device)  # the next measurement begins to count anew
            evaluator.measure_speed()
        # Save.
        if staging is not None:
            with session.clock.stage("save"):
                if parallel.is_first():
                    _save(session, result, staging)
                parallel.barrier()
        report = SurgeryReport(
            base_model=base_model_record(original, sha256),
            plan=result.plan,
            scores=scores,
            refit=result.refitted,
            expected=result.expected,
            spectra=result.spectra,
            before=evaluator.result("before"),
            after=evaluator.result("after"),
            comparison=comparison,
            continuations=evaluator.side_by_side(),
            failures=evaluator.failures,
            timings=session.clock.rounded,
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_memory_bytes=device_peak,
            calibration=described_tokens(tokens),
            provenance=run_provenance(session, config),
            output=str(config.output) if staging is not None else None,
        )
        return report if staging is None or not parallel.is_first() else _write_report(report, staging, config)


def _save(session: Session, result: Result, directory: Path) -> None:
    original, progress = session.checkpoint, session.ui.progress
    save_checkpoint(result.checkpoint, directory, base=original, tokenizer=session.tokenizer, progress=progress)
    check_saved(directory, result.checkpoint)


def _open_output(model: Model, config: CompressConfig, stack: ExitStack) -> Path | None:
    """Return a staging directory that becomes the output when `stack` is left; None for a dry run.

    With several processes it is the first one's.
    """
    if config.output is None:
        return None
    made = None
    if parallel.is_first():
        made = _staging(model, config, config.output, stack)
    staging = parallel.from_first(lambda: None if made is None else str(made))
    return None if staging is None else Path(staging)


def _staging(model: Model, config: CompressConfig, output: Path, stack: ExitStack) -> Path | None:
    check_not_same(model, output)
    check_output(output, overwrite=config.overwrite)
    return None if config.dry_run else stack.enter_context(staged_directory(output, overwrite=config.overwrite))


def _check_plan_is_for(config: CompressConfig, sha256: str) -> None:
    if config.plan is not None and config.plan.plan.base_sha256 not in ("", sha256):
        raise PlanError(
            f"{config.plan.name} was made for another checkpoint (its base_sha256 begins "
            f"{config.plan.plan.base_sha256[:12]}, this one's {sha256[:12]}); to apply it all the same, clear "
            "base_sha256 in the plan."
        )


def _write_report(report: SurgeryReport, directory: Path, config: CompressConfig) -> SurgeryReport:
    """Write `surgery.json`, page and card; if these fail, that is recorded and the model is not lost."""
    write_json(directory / REPORT_FILE, report_dict(report))
    assert config.output is not None
    try:
        write_page_and_card(directory, report, config.output.name)
    except Exception as error:
        _LOG.debug("the report page failed", exc_info=True)
        failure = StageFailure(stage="report page", error=describe(error))
        report = replace(report, failures=[*report.failures, failure])
        write_json(directory / REPORT_FILE, report_dict(report))
    return report
