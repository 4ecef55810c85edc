"""One point: operate as `compress` would, with all that points share, and measure what comes of it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.config import CompressConfig
from layer_surgery.errors import describe
from layer_surgery.records import EvaluationResult, LayerScores, StageFailure
from layer_surgery.records.sweep import SweepPoint, SweepSettings
from layer_surgery.runs.compression import Compression
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.operation import Operation, RefitData
from layer_surgery.runs.session import Session
from layer_surgery.runs.sweep.pareto import perplexity_ratio
from layer_surgery.scoring import ScoringContext
from layer_surgery.walk.walk import Walk

_LOG = logging.getLogger(__name__)


@dataclass
class PointBench:
    """What points share: the model, its measurements, the walk over the calibration data, statistics and scores."""

    session: Session
    evaluator: Evaluator
    """It has measured the original."""
    walk: Walk
    statistics: StatisticsSource
    refit_data: RefitData | None
    base_sha256: str
    _scores: dict[tuple[object, ...], LayerScores] = field(default_factory=dict)

    def measure(self, config: CompressConfig, settings: SweepSettings) -> SweepPoint:
        """Carry out and measure one compression. What fails is recorded, so that the others go on."""
        start, failures = time.perf_counter(), len(self.evaluator.failures)
        try:
            with self.session.own_scratch("point") as session:
                scores, operation = self._operate(Compression(config, session))
                point = self._evaluate(settings, scores, operation, failures)
        except Exception as error:
            _LOG.debug("%s failed", settings.name, exc_info=True)
            point = _point(settings, status="failed", error=describe(error))
        finally:
            self.evaluator.forget("after")
        return replace(point, seconds=round(time.perf_counter() - start, 3))

    def _operate(self, job: Compression) -> tuple[LayerScores, Operation]:
        trial = job.trial_plan()
        statistics = self.statistics.branch(job.session.new_scratch("statistics"))
        scores = self._ranked(job, job.scoring_context(self.walk, statistics, trial))
        data = self.refit_data if job.refit_scope(trial) is not None else None
        operation = job.carry_out(self.walk, statistics, scores, data, trial=trial, base_sha256=self.base_sha256)
        return scores, operation

    def _ranked(self, job: Compression, context: ScoringContext) -> LayerScores:
        """Rank the layers, or return the ranking that another point has had for all that this scorer looks at."""
        key = (job.scorer.name, *(getattr(context, name) for name in job.scorer.depends_on))
        if key not in self._scores:
            self._scores[key] = job.scores(context)
        return self._scores[key]

    def _evaluate(
        self, settings: SweepSettings, scores: LayerScores, operation: Operation, known_failures: int
    ) -> SweepPoint:
        evaluator, plan = self.evaluator, operation.plan
        evaluator.measure("after", operation.checkpoint)
        comparison = evaluator.compare()
        evaluator.measure_speed()
        before, after = evaluator.result("before"), evaluator.result("after")
        failures = evaluator.failures[known_failures:]
        prefill, decode = _speeds(before, after)
        return _point(
            settings,
            status="failed" if failures else "done",
            error=_sentence(failures),
            layers=[layer.index for layer in plan.operated],
            parameters=after.parameters,
            predicted_loss_rise=plan.predicted_loss_rise,
            perplexity_ratio=perplexity_ratio(before, after),
            prefill_speed=prefill,
            decode_speed=decode,
            plan=plan,
            scores=scores,
            result=after,
            original_speed=before.speed if after.speed else [],
            comparison=comparison,
            failures=failures,
        )


def _sentence(failures: list[StageFailure]) -> str | None:
    return "; ".join(f"{failure.stage} failed: {failure.error}" for failure in failures) or None


def _speeds(before: EvaluationResult, after: EvaluationResult) -> tuple[float | None, float | None]:
    """Return prefill and decoding speed after / before, of the first that was measured."""
    if not before.speed or not after.speed:
        return None, None
    old, new = before.speed[0], after.speed[0]
    return (
        new.prefill_tokens_per_second / old.prefill_tokens_per_second,
        new.decode_tokens_per_second / old.decode_tokens_per_second,
    )


def _point(settings: SweepSettings, **found: object) -> SweepPoint:
    return SweepPoint(**vars(settings) | found)  # type: ignore[arg-type]
