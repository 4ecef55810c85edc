"""Composes a run: open, evaluate, score, plan, operate (operation.py), evaluate (evaluator.py), save."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from layer_surgery.calibration.cache import check_cache
from layer_surgery.checkpoint.save import (
    check_free_space,
    check_not_same,
    check_output,
    check_saved,
    save_checkpoint,
    staged_directory,
)
from layer_surgery.config import DEFAULT_METHOD, BudgetConfig, CompressConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import OutputError, PlanError, describe
from layer_surgery.machine import peak_device_memory_bytes, peak_memory_bytes
from layer_surgery.progress import Ui
from layer_surgery.records import LayerScores, StageFailure, SurgeryPlan, SurgeryReport
from layer_surgery.records.reading import REPORT_FILE
from layer_surgery.reporting.publish import write_page_and_card
from layer_surgery.runs.compression import Compression, check_options
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.operation import RefitData, refit_data, statistics_source
from layer_surgery.runs.provenance import (
    base_model_record,
    calibration_names,
    checkpoint_hash,
    described_tokens,
    report_dict,
    rounded,
    run_provenance,
)
from layer_surgery.runs.session import Model, calibration_walk, check_column, open_session

_LOG = logging.getLogger(__name__)


def run_compress(
    model: Model,
    config: CompressConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
    known_scores: LayerScores | None = None,
) -> SurgeryReport:
    """Compress a model: the main job. Everything that can be refused is refused before any work is done.

    `known_scores` are what the scorer has given for the same options before; it is then not asked again.
    """
    given = _given_plan(config)
    config = replace(config, method=config.method or (given.method if given else "") or DEFAULT_METHOD)
    check_options(config)
    if config.output is None and not config.dry_run:
        raise OutputError("give --output (a directory for the compressed model), or --dry-run.")
    check_cache(config.runtime.cache)
    check_column(config.calibration.column, [*calibration_names(config.calibration), *config.evaluation.sources])
    with ExitStack() as stack:
        staging = None
        if config.output is not None:
            check_not_same(model, config.output)
            check_output(config.output, overwrite=config.overwrite)
            if not config.dry_run:
                staging = stack.enter_context(staged_directory(config.output, overwrite=config.overwrite))
        session = stack.enter_context(
            open_session(model, tokenizer, config.runtime, ui or Ui(), staging.parent if staging else None)
        )
        job = Compression(config, session)
        trial = job.trial_plan()
        if staging is not None:
            check_free_space(staging, trial.parameters * session.checkpoint.dtype.itemsize)
        scope = job.refit_scope(trial)
        tokens = session.calibration_tokens(config.calibration) if job.needs_data(trial) else None
        data = refit_data(session, tokens, scope, config.refit.general) if tokens is not None and scope else None
        texts = session.evaluation_tokens(config.evaluation)
        evaluator = stack.enter_context(Evaluator(session, config.evaluation, texts, baseline=session))
        report = _Run(job, trial, tokens, data, known_scores).operate(evaluator, staging)
    return report


def _given_plan(config: CompressConfig) -> SurgeryPlan | None:
    if config.plan is None:
        return None
    budget = config.budget
    if budget != BudgetConfig():
        raise PlanError(
            "--plan says already which layers and ranks; leave out --target-layers, --layers, --keep, "
            "--target-parameters and --remove."
        )
    return config.plan


@dataclass
class _Run:
    job: Compression
    trial: SurgeryPlan
    tokens: PackedTokens | None
    data: RefitData | None
    known_scores: LayerScores | None

    def operate(self, evaluator: Evaluator, staging: Path | None) -> SurgeryReport:
        job, session, config, tokens = self.job, self.job.session, self.job.config, self.tokens
        clock = session.clock
        session.stream(session.checkpoint)  # proves, before anything else is done, that it can be walked over
        sha256 = checkpoint_hash(session)
        _check_hash(config, sha256)
        with clock.stage("evaluate_before"):
            evaluator.measure("before", session.checkpoint)
        with calibration_walk(session, session.stream(session.checkpoint), tokens) as walk:
            statistics = statistics_source(session, sha256, config.runtime.cache, config.budget.remove)
            scores = self.known_scores
            if scores is None and job.chooses:
                scores = job.scores(job.scoring_context(walk, statistics, self.trial))
            operation = job.carry_out(walk, statistics, scores, self.data, trial=self.trial, base_sha256=sha256)
        plan, operated = operation.plan, operation.checkpoint
        with clock.stage("evaluate_after"):
            evaluator.measure("after", operated)
            comparison = evaluator.compare()
            device_peak = peak_device_memory_bytes(session.device)  # the next measurement begins to count anew
            evaluator.measure_speed()
        if staging is not None:
            with clock.stage("save"):
                save_checkpoint(
                    operated, staging, base=job.checkpoint, tokenizer=session.tokenizer, progress=session.ui.progress
                )
                check_saved(staging, operated)
        report = SurgeryReport(
            base_model=base_model_record(session.checkpoint, sha256),
            plan=plan,
            scores=scores,
            refit=operation.refitted,
            spectra=operation.spectra,
            before=evaluator.result("before"),
            after=evaluator.result("after"),
            comparison=comparison,
            continuations=evaluator.side_by_side(),
            failures=evaluator.failures,
            timings=rounded(clock.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_memory_bytes=device_peak,
            calibration=described_tokens(tokens),
            provenance=run_provenance(session, config.command, config.describe()),
            output=str(config.output) if staging is not None else None,
        )
        if staging is not None:
            _write_report(report, staging)
            report = self._with_page(report, staging)
        return report

    def _with_page(self, report: SurgeryReport, staging: Path) -> SurgeryReport:
        """Write page and card; their failure must not lose the model, so it is recorded like that of an evaluation."""
        assert self.job.config.output is not None
        try:
            write_page_and_card(staging, report, self.job.config.output.name)
        except Exception as error:
            _LOG.debug("the report page failed", exc_info=True)
            failure = StageFailure(stage="report page", error=describe(error))
            report = replace(report, failures=[*report.failures, failure])
            _write_report(report, staging)
        return report


def _check_hash(config: CompressConfig, sha256: str) -> None:
    if config.plan is not None and config.plan.base_sha256 not in ("", sha256):
        raise PlanError(
            f"{config.plan_name} was made for another checkpoint (its base_sha256 begins "
            f"{config.plan.base_sha256[:12]}, this one's {sha256[:12]}); to apply it all the same, clear "
            "base_sha256 in the plan."
        )


def _write_report(report: SurgeryReport, directory: Path) -> None:
    text = json.dumps(report_dict(report), indent=2, ensure_ascii=False, allow_nan=False)
    (directory / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
