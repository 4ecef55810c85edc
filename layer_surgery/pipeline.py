"""Composes a run: open, evaluate, score, plan, operate (operation.py), evaluate (evaluator.py), save."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layer_surgery.checkpoint import Checkpoint, open_checkpoint
from layer_surgery.config import (
    DEFAULT_METHOD,
    BudgetConfig,
    CalibrationConfig,
    CompressConfig,
    EvaluationConfig,
    RuntimeConfig,
    as_json,
)
from layer_surgery.data import weighted_sources
from layer_surgery.errors import CheckpointError, OutputError, PlanError
from layer_surgery.evaluator import Evaluator
from layer_surgery.operated import operated_checkpoint
from layer_surgery.operation import RefitData, operate, refit_data, statistics_source
from layer_surgery.provenance import peak_device_memory_bytes, peak_memory_bytes, provenance
from layer_surgery.records import EvaluationReport, LayerScores, Part, RefitScope, SurgeryPlan, SurgeryReport
from layer_surgery.registry import Entry
from layer_surgery.saving import REPORT_FILE, check_free_space, check_output, save_checkpoint, staged_directory
from layer_surgery.scoring import SCORERS, Scorer, ScoringContext
from layer_surgery.selfcheck import check_survivors
from layer_surgery.session import Model, Session, Ui, calibration_walk, check_column, open_session
from layer_surgery.statistics_cache import StatisticsSource, check_cache
from layer_surgery.streaming import StreamedModel
from layer_surgery.surgeon import (
    METHODS,
    LayerShape,
    Method,
    ModelShape,
    check_plan,
    make_plan,
    removal_count,
)
from layer_surgery.tokens import PackedTokens
from layer_surgery.walk import Walk


def run_score(
    model: Model,
    *,
    scorer: str,
    target_layers: int | None,
    calibration: CalibrationConfig,
    remove: Part = "layer",
    runtime: RuntimeConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
    command: str | None = None,
) -> LayerScores:
    """Rank the decoder layers of a model."""
    entry = SCORERS[scorer]
    if remove != "layer" and not entry.parts:
        raise PlanError(f"--scorer {scorer} ranks whole layers; leave out --remove {remove}.")
    check_cache(runtime.cache)
    check_column(calibration.column, _calibration_names(calibration))
    with open_session(model, tokenizer, runtime, ui or Ui(), None) as session:
        layer_count = session.checkpoint.layer_count
        if target_layers is not None and not 1 <= target_layers < layer_count:
            raise PlanError(
                f"--target-layers is {target_layers}; allowed: 1 to {layer_count - 1} "
                f"(the model has {layer_count} layers)."
            )
        count = None if target_layers is None else layer_count - target_layers
        tokens = session.calibration_tokens(calibration) if entry.needs_data else None
        with calibration_walk(session, session.stream(session.checkpoint), tokens) as walk:
            scores = entry.function(
                ScoringContext(
                    walk=walk,
                    count=count,
                    seed=runtime.seed,
                    statistics=statistics_source(session, "", runtime.cache, remove),
                    keep=BudgetConfig.DEFAULT_KEEP,
                )
            )
        settings = {
            "model": session.checkpoint.name,
            "scorer": scorer,
            "target_layers": target_layers,
            "remove": remove,
            "calibration": as_json(calibration),
            "runtime": as_json(runtime),
        }
        return replace(scores, provenance=_run_provenance(session, command, settings))


def run_evaluate(
    model: Model,
    *,
    baseline: Model | None,
    evaluation: EvaluationConfig,
    runtime: RuntimeConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
    command: str | None = None,
) -> EvaluationReport:
    """Measure a model and, with `baseline`, another one on the same data."""
    check_column(evaluation.column, evaluation.sources)
    with ExitStack() as stack:
        session = stack.enter_context(open_session(model, tokenizer, runtime, ui or Ui(), None))
        texts = session.evaluation_tokens(evaluation)
        other = None
        if baseline is not None:
            opened = stack.enter_context(open_session(baseline, tokenizer, runtime, Ui(), None))
            _check_same_tokens(session, opened, texts, evaluation)
            other = replace(opened, ui=session.ui)
        evaluator = stack.enter_context(Evaluator(session, evaluation, texts, baseline=other))
        if other is not None:
            evaluator.measure("before", other.checkpoint)
        evaluator.measure("after", session.checkpoint)
        comparison = evaluator.compare() if other is not None else None
        evaluator.measure_speed()
        settings = {
            "model": session.checkpoint.name,
            "baseline": other.checkpoint.name if other is not None else None,
            "evaluation": as_json(evaluation),
            "runtime": as_json(runtime),
        }
        return EvaluationReport(
            model=evaluator.result("after"),
            baseline=evaluator.result("before") if other is not None else None,
            comparison=comparison,
            continuations=evaluator.side_by_side(),
            failures=evaluator.failures,
            timings=_rounded(session.clock.seconds),
            provenance=_run_provenance(session, command, settings),
        )


def _check_same_tokens(session: Session, other: Session, texts: list[PackedTokens], config: EvaluationConfig) -> None:
    """Raise `CheckpointError` unless both models read the texts as the same tokens."""
    for ours, theirs in zip(texts, other.evaluation_tokens(config), strict=True):
        if ours.sha256 != theirs.sha256:
            raise CheckpointError(
                f"{session.checkpoint.name} and the baseline {other.checkpoint.name} tokenise '{ours.name}' "
                "differently, so their perplexities cannot be compared; evaluate each by itself."
            )


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
    check_column(config.calibration.column, [*_calibration_names(config.calibration), *config.evaluation.sources])
    with ExitStack() as stack:
        staging = None
        if config.output is not None:
            _check_not_same(model, config.output)
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


def _calibration_names(config: CalibrationConfig) -> list[str]:
    """Return the sources without their weights; refuses wrong weights before there is anything to undo."""
    return [source.name for source in weighted_sources(config.sources)]


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
            timings=_rounded(clock.seconds),
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_memory_bytes=device_peak,
            calibration=_describe(tokens),
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
        return _run_provenance(self.session, self.config.command, self.config.describe())


def model_shape(checkpoint: Checkpoint, part: Part = "layer") -> ModelShape:
    """Return the sizes that planning needs, of all layers or of a part of each.

    Linears that are low-rank already cannot be replaced again.
    """
    layers = []
    for index in range(checkpoint.layer_count):
        prefix = checkpoint.layer_prefix(index)
        linears = {}
        for name in checkpoint.architecture.linears_of(part):
            spec = checkpoint.source.specs.get(f"{prefix}{name}.weight")
            if spec is not None:
                linears[name] = (spec.shape[0], spec.shape[1])
        parameters = checkpoint.layer_parameters(index)
        if part != "layer":
            parameters = sum(
                p.numel() for name in linears for p in checkpoint.layers[index].get_submodule(name).parameters()
            )
        layers.append(LayerShape(linears=linears, parameters=parameters))
    return ModelShape(layers=layers, parameters=checkpoint.parameters)


def report_dict(report: SurgeryReport) -> dict[str, Any]:
    """Return what `surgery.json` holds."""
    data = report.to_dict()
    data.pop("output")
    return data


def _run_provenance(session: Session, command: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    dtype = session.runtime.torch_dtype(session.device, session.checkpoint.dtype)
    return provenance(session.device) | {
        "command": command,
        "seed": session.runtime.seed,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "config": settings,
    }


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def _describe(tokens: PackedTokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    described = {k: v for k, v in asdict(tokens).items() if isinstance(v, str | int)}
    return described | {
        "sequences": tokens.sequences,
        "sequence_length": tokens.sequence_length,
        "tokens": int(tokens.valid.sum()),
        "predicted_tokens": tokens.predicted_tokens,
        "sources": [asdict(source) for source in tokens.sources],
    }


def _check_not_same(model: Model, output: Path) -> None:
    if isinstance(model, PreTrainedModel) or not (output.exists() and Path(model).exists()):
        return
    if output.samefile(model):
        raise OutputError(f"--output {output} is the model itself; give another directory.")
    if output.resolve() in Path(model).resolve().parents:
        raise OutputError(f"--output {output} holds the model, which would be lost; give another directory.")


def _check_saved(directory: Path, operated: Checkpoint) -> None:
    """Open what was written: every tensor must be there with its shape, and the parameters must add up."""
    saved = open_checkpoint(directory, trust_remote_code=operated.trust_remote_code)
    if saved.parameters != operated.parameters or saved.low_rank != operated.low_rank:
        raise CheckpointError(
            f"what was written to {directory} is not what was to be written; this is a bug, report it."
        )
