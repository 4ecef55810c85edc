"""Composes a run: open, evaluate, score, plan, operate (operation.py), evaluate (evaluator.py), save."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from layer_surgery.checkpoint import Checkpoint, open_checkpoint
from layer_surgery.config import (
    DEFAULT_METHOD,
    BudgetConfig,
    CompressConfig,
)
from layer_surgery.errors import CheckpointError, OutputError, PlanError
from layer_surgery.evaluator import Evaluator
from layer_surgery.operated import operated_checkpoint
from layer_surgery.operation import RefitData, operate, refit_data, statistics_source
from layer_surgery.provenance import peak_device_memory_bytes, peak_memory_bytes
from layer_surgery.records import LayerScores, RefitScope, SurgeryPlan, SurgeryReport
from layer_surgery.registry import Entry
from layer_surgery.run_records import calibration_names, described_tokens, report_dict, rounded, run_provenance
from layer_surgery.saving import (
    REPORT_FILE,
    check_free_space,
    check_not_same,
    check_output,
    save_checkpoint,
    staged_directory,
)
from layer_surgery.scoring import SCORERS, Scorer, ScoringContext
from layer_surgery.selfcheck import check_survivors
from layer_surgery.session import Model, Session, Ui, calibration_walk, check_column, open_session
from layer_surgery.statistics_cache import StatisticsSource, check_cache
from layer_surgery.streaming import StreamedModel
from layer_surgery.surgeon import (
    METHODS,
    Method,
    check_plan,
    make_plan,
    model_shape,
    removal_count,
)
from layer_surgery.tokens import PackedTokens
from layer_surgery.walk import Walk


def run_compress(
    model: Model,
    config: CompressConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
) -> SurgeryReport:
    """Compress a model: the main job. Everything that can be refused is refused before any work is done."""
    given = _given_plan(config)
    config = replace(config, method=config.method or (given.method if given else "") or DEFAULT_METHOD)
    scorer, method = SCORERS[config.scorer], METHODS[config.method or DEFAULT_METHOD]
    if config.output is None and not config.dry_run:
        raise OutputError("give --output (a directory for the compressed model), or --dry-run.")
    if method.removes and (config.budget.keep or config.budget.target_parameters is not None):
        raise PlanError(
            f"--method {method.name} keeps nothing of the layers; leave out --keep and --target-parameters."
        )
    _check_part(config, scorer, method)
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
        run = _Compression(config, session, method, given)
        chooses = given is None and config.budget.layers is None
        trial = run.trial_plan()
        if chooses and trial.low_rank and session.checkpoint.low_rank:
            raise PlanError(
                f"{session.checkpoint.name} has low-rank layers already, which a scorer cannot choose again; name the "
                "layers with --layers, remove outright with --keep 0, or start from the original."
            )
        if staging is not None:
            check_free_space(staging, trial.parameters * session.checkpoint.dtype.itemsize)
        scope = run.refit_scope(trial)
        needs_data = (
            scope is not None
            or (method.needs_data and bool(trial.low_rank or method.removes))
            or (chooses and scorer.needs_data)
        )
        tokens = session.calibration_tokens(config.calibration) if needs_data else None
        data = refit_data(session, tokens, scope, config.refit.general) if tokens is not None and scope else None
        texts = session.evaluation_tokens(config.evaluation)
        evaluator = stack.enter_context(Evaluator(session, config.evaluation, texts, baseline=session))
        report = run.operate(
            trial=trial, chooses=chooses, tokens=tokens, data=data, evaluator=evaluator, staging=staging
        )
    return report


def _check_part(config: CompressConfig, scorer: Entry[Scorer], method: Entry[Method]) -> None:
    part = config.budget.remove
    if part == "layer":
        return
    if method.removes and method.name != "remove":
        raise PlanError(f"--method {method.name} works on whole layers; leave out --remove {part}.")
    if config.plan is None and config.budget.layers is None and not scorer.parts:
        able = ", ".join(entry.name for entry in SCORERS if entry.parts)
        raise PlanError(
            f"--scorer {scorer.name} ranks whole layers; for --remove {part} take one of {able}, or name --layers."
        )


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
class _Compression:
    config: CompressConfig
    session: Session
    method: Entry[Method]
    given: SurgeryPlan | None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.session.checkpoint

    def trial_plan(self) -> SurgeryPlan:
        """Return the given plan, or one for the layers that come first, so that an impossible budget stops here.

        It tells how many layers go, whether anything becomes low-rank, and about how large the result is.
        """
        shape = model_shape(self.checkpoint, self.config.budget.remove)
        if self.given is not None:
            plan = check_plan(model_shape(self.checkpoint), self.given, self.config.plan_name)
            if plan.low_rank and self.method.removes:
                raise PlanError(
                    f"{self.config.plan_name} has low-rank layers, but --method {self.method.name} makes none."
                )
            return plan
        count = removal_count(self.config.budget, self.checkpoint.layer_count)
        untouched = [index for index, layer in enumerate(shape.layers) if layer.linears]
        stand_ins = (untouched + [index for index in range(len(shape.layers)) if index not in untouched])[:count]
        return make_plan(shape, self.config.budget.layers or stand_ins, self._budget(), self.method.name)

    def refit_scope(self, trial: SurgeryPlan) -> RefitScope | None:
        """Return what is refitted: as the user says, else as the given plan says, else as the method does."""
        wanted, scope = self.config.refit.enabled, self.config.refit.scope
        if wanted is None and self.given is not None and self.given.refit:
            return None if self.given.refit == "none" else self.given.refit
        if not (self.method.refits if wanted is None else wanted):
            return None
        if scope == "operated" and not trial.low_rank:
            raise PlanError(
                "--refit-scope operated refits low-rank layers, and nothing becomes low-rank here; take "
                "--refit-scope all or --no-refit."
            )
        return scope

    def operate(
        self,
        *,
        trial: SurgeryPlan,
        chooses: bool,
        tokens: PackedTokens | None,
        data: RefitData | None,
        evaluator: Evaluator,
        staging: Path | None,
    ) -> SurgeryReport:
        session, config, clock = self.session, self.config, self.session.clock
        count = len(trial.operated)
        session.stream(self.checkpoint)  # proves, before anything else is done, that it can be walked over
        sha256 = self._hash()
        self._check_hash(sha256)
        with clock.stage("evaluate_before"):
            evaluator.measure("before", self.checkpoint)
        with calibration_walk(session, session.stream(self.checkpoint), tokens) as walk:
            statistics = statistics_source(session, sha256, config.runtime.cache, config.budget.remove)
            scores = self._scores(walk, count, statistics, trial) if chooses else None
            plan = self._plan(scores, count, sha256)
            self._check_survivors(plan, walk.model)
            operation = operate(
                session,
                walk,
                plan,
                self.method,
                statistics,
                refit_data=data,
                ranks_fixed=self.given is not None,
            )
        plan, operated = operation.plan, operation.checkpoint
        with clock.stage("evaluate_after"):
            evaluator.measure("after", operated)
            comparison = evaluator.compare()
            device_peak = peak_device_memory_bytes(session.device)  # the next measurement begins to count anew
            evaluator.measure_speed()
        if staging is not None:
            with clock.stage("save"):
                save_checkpoint(
                    operated, staging, base=self.checkpoint, tokenizer=session.tokenizer, progress=session.ui.progress
                )
                _check_saved(staging, operated)
        report = SurgeryReport(
            base_model=self._base_model(sha256),
            plan=plan,
            scores=scores,
            refit=operation.refitted,
            before=evaluator.result("before"),
            after=evaluator.result("after"),
            comparison=comparison,
            continuations=evaluator.side_by_side(),
            failures=evaluator.failures,
            timings=rounded(clock.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_memory_bytes=device_peak,
            calibration=described_tokens(tokens),
            provenance=self._provenance(),
            output=str(config.output) if staging is not None else None,
        )
        if staging is not None:
            text = json.dumps(report_dict(report), indent=2, ensure_ascii=False, allow_nan=False)
            (staging / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        return report

    def _scores(self, walk: Walk, count: int, statistics: StatisticsSource, trial: SurgeryPlan) -> LayerScores:
        with self.session.clock.stage("score"):
            return SCORERS[self.config.scorer].function(
                ScoringContext(
                    walk=walk,
                    count=count,
                    seed=self.config.runtime.seed,
                    statistics=statistics,
                    keep=self.config.budget.keep or BudgetConfig.DEFAULT_KEEP,
                    refit=self.refit_scope(trial) is not None,
                    keep_boundaries=bool(trial.low_rank) and self.method.needs_boundaries,
                )
            )

    def _budget(self) -> BudgetConfig:
        budget = self.config.budget
        return replace(budget, keep=0.0) if self.method.removes else budget

    def _plan(self, scores: LayerScores | None, count: int, sha256: str) -> SurgeryPlan:
        if self.given is not None:
            plan = check_plan(model_shape(self.checkpoint), self.given, self.config.plan_name)
            return replace(plan, base_sha256=sha256, method=self.method.name)
        shape = model_shape(self.checkpoint, self.config.budget.remove)
        chosen = self.config.budget.layers or (scores.removal_order[:count] if scores else ())
        return replace(make_plan(shape, chosen, self._budget(), self.method.name), base_sha256=sha256)

    def _check_survivors(self, plan: SurgeryPlan, model: StreamedModel) -> None:
        """Check that the layers that stay are not changed by the going of others, before anything is computed."""
        if len(plan.surviving) == len(plan.layers):
            return
        kept = [replace(layer, action="keep", ranks={}) if layer.ranks else layer for layer in plan.layers]
        rest = operated_checkpoint(self.checkpoint, replace(plan, layers=kept))
        operated = StreamedModel(rest, device=model.device, dtype=model.dtype)
        check_survivors(model, operated, plan.surviving)

    def _hash(self) -> str:
        tensors = len(self.checkpoint.source.specs)
        with self.session.clock.stage("hash"), self.session.ui.progress("hashing", tensors) as advance:
            return self.checkpoint.sha256(advance)

    def _check_hash(self, sha256: str) -> None:
        if self.given is not None and self.given.base_sha256 not in ("", sha256):
            raise PlanError(
                f"{self.config.plan_name} was made for another checkpoint (its base_sha256 begins "
                f"{self.given.base_sha256[:12]}, this one's {sha256[:12]}); to apply it all the same, clear "
                "base_sha256 in the plan."
            )

    def _base_model(self, sha256: str) -> dict[str, Any]:
        checkpoint = self.checkpoint
        return {
            "name": checkpoint.name,
            "model_type": checkpoint.architecture.model_type,
            "sha256": sha256,
            "layers": checkpoint.layer_count,
            "parameters": checkpoint.parameters,
            "size_bytes": checkpoint.size_bytes,
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
        }

    def _provenance(self) -> dict[str, Any]:
        return run_provenance(self.session, self.config.command, self.config.describe())


def _check_saved(directory: Path, operated: Checkpoint) -> None:
    """Open what was written: every tensor must be there with its shape, and the parameters must add up."""
    saved = open_checkpoint(directory, trust_remote_code=operated.trust_remote_code)
    if saved.parameters != operated.parameters or saved.low_rank != operated.low_rank:
        raise CheckpointError(
            f"what was written to {directory} is not what was to be written; this is a bug, report it."
        )
