"""Evaluation alone: one model, or two on the same data."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import attrs

from layer_surgery import parallel
from layer_surgery.config import EvaluateConfig
from layer_surgery.data.bundled import bundled_tasks
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError, UserError
from layer_surgery.evaluation.task_names import check_task_names
from layer_surgery.progress import Ui
from layer_surgery.records import EvaluationReport
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.provenance import run_provenance
from layer_surgery.runs.session import Model, Session, check_sources, open_session
from layer_surgery.runs.stages import stages_of_evaluation
from layer_surgery.runs.verify import check_whole


def run_evaluate(model: Model, config: EvaluateConfig) -> EvaluationReport:
    """Measure a model and, with a baseline, another one on the same data."""
    check_sources(config.text_column, evaluation=config.eval_data)
    check_task_names(config, bundled_tasks)
    if config.verify:
        if not isinstance(model, str | Path):
            raise UserError("verify=True compares the files of a result, but the model is in memory; give a directory.")
        parallel.from_first(lambda: check_whole(Path(model), config.ui.progress))
    with ExitStack() as stack:
        session = stack.enter_context(open_session(model, config, None))
        texts = session.evaluation_tokens(config)
        other = None
        if config.baseline is not None:
            opened = stack.enter_context(open_session(config.baseline, attrs.evolve(config, ui=Ui()), None))
            _check_same_tokens(session, opened, texts, config)
            other = replace(opened, ui=session.ui)
        evaluator = stack.enter_context(Evaluator(session, config, texts, baseline=other))
        session.ui.plan(stages_of_evaluation(texts, baseline=other is not None))
        if other is not None:
            with session.ui.stage("evaluate_before"):
                evaluator.measure("before", other.checkpoint)
        with session.ui.stage("evaluate_after"):
            evaluator.measure("after", session.checkpoint)
            comparison = evaluator.compare() if other is not None else None
            evaluator.measure_speed()
        return EvaluationReport(
            model=evaluator.result("after"),
            baseline=evaluator.result("before") if other is not None else None,
            comparison=comparison,
            continuations=evaluator.side_by_side(),
            failures=evaluator.failures,
            timings=session.clock.rounded,
            provenance=run_provenance(
                session, config, model=session.checkpoint.name, baseline=other.checkpoint.name if other else None
            ),
        )


def _check_same_tokens(session: Session, other: Session, texts: list[PackedTokens], config: EvaluateConfig) -> None:
    """Raise `CheckpointError` unless both models read the texts as the same tokens."""
    for ours, theirs in zip(texts, other.evaluation_tokens(config), strict=True):
        if ours.sha256 != theirs.sha256:
            raise CheckpointError(
                f"{session.checkpoint.name} and the baseline {other.checkpoint.name} tokenise '{ours.name}' "
                "differently, so their perplexities cannot be compared; evaluate each by itself."
            )
