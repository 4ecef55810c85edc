"""Scoring alone, and evaluation alone: the runs that write no model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from layer_surgery.calibration.cache import check_cache
from layer_surgery.config import BudgetConfig, CalibrationConfig, EvaluationConfig, RuntimeConfig, as_json
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError, PlanError
from layer_surgery.progress import Ui
from layer_surgery.records import EvaluationReport, LayerScores, Part
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.operation import statistics_source
from layer_surgery.runs.provenance import calibration_names, rounded, run_provenance
from layer_surgery.runs.session import Model, Session, calibration_walk, check_column, open_session
from layer_surgery.scoring import SCORERS, ScoringContext


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
    check_column(calibration.column, calibration_names(calibration))
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
            scores = entry.scores(
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
        return replace(scores, provenance=run_provenance(session, command, settings))


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
            timings=rounded(session.clock.seconds),
            provenance=run_provenance(session, command, settings),
        )


def _check_same_tokens(session: Session, other: Session, texts: list[PackedTokens], config: EvaluationConfig) -> None:
    """Raise `CheckpointError` unless both models read the texts as the same tokens."""
    for ours, theirs in zip(texts, other.evaluation_tokens(config), strict=True):
        if ours.sha256 != theirs.sha256:
            raise CheckpointError(
                f"{session.checkpoint.name} and the baseline {other.checkpoint.name} tokenise '{ours.name}' "
                "differently, so their perplexities cannot be compared; evaluate each by itself."
            )
