"""One point: operate as `compress` would, with all that points share, and measure what comes of it."""

import logging
import time
from dataclasses import dataclass, field, replace

from layer_surgery import parallel
from layer_surgery.checkpoint.heads import CAUSAL_LM, EMBEDDING
from layer_surgery.config import CompressConfig
from layer_surgery.errors import describe
from layer_surgery.records import LayerScores
from layer_surgery.records.sweep import SweepPoint, SweepSettings
from layer_surgery.runs.bench import Bench, Result
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.planning import Planning
from layer_surgery.runs.sweep.pareto import loss_ratio, mean_loss, perplexity_ratio

_LOG = logging.getLogger(__name__)


@dataclass
class Measuring:
    """The points of a sweep, one after another, on one bench."""

    bench: Bench
    evaluator: Evaluator  #: It has measured the original.
    base_sha256: str
    _scores: dict[tuple[object, ...], LayerScores] = field(default_factory=dict)

    def point(self, config: CompressConfig, settings: SweepSettings) -> SweepPoint:
        """Carry out and measure one compression. What fails is recorded, so that the others go on."""
        start, failures = time.perf_counter(), len(self.evaluator.failures)
        try:
            with self.bench.own_scratch("point") as bench:
                planning = Planning(config, bench.session.checkpoint, bench.session.device)
                scores = bench.scores(**planning.ranking, known=self._scores)
                result = bench.operate(
                    planning.plan(scores, self.base_sha256, bench.first_removable), **planning.surgery
                )
                point = self._evaluate(settings, scores, result, failures)
        except Exception as error:
            if not parallel.in_step(error):
                raise
            _LOG.debug("%s failed", settings.name, exc_info=True)
            point = _point(settings, status="failed", error=describe(error))
        finally:
            self.evaluator.forget("after")
        return replace(point, seconds=round(time.perf_counter() - start, 3))

    def _evaluate(
        self, settings: SweepSettings, scores: LayerScores, result: Result, known_failures: int
    ) -> SweepPoint:
        evaluator, plan = self.evaluator, result.plan
        evaluator.measure("after", result.checkpoint)
        comparison = evaluator.compare()
        evaluator.measure_speed()
        before, after = evaluator.result("before"), evaluator.result("after")
        head = self.bench.session.checkpoint.head
        failures = evaluator.failures[known_failures:]
        speeds = {}
        if before.speed and after.speed:  # at the first batch size and prompt length
            for stage in ("prefill", "decode"):
                old, new = (getattr(model.speed[0], f"{stage}_tokens_per_second") for model in (before, after))
                if old is not None and new is not None:
                    speeds[f"{stage}_speed"] = new / old
        return _point(
            settings,
            status="failed" if failures else "done",
            error="; ".join(f"{failure.stage} failed: {failure.error}" for failure in failures) or None,
            layers=[layer.index for layer in plan.operated],
            parameters=after.parameters,
            predicted_loss_rise=plan.predicted_loss_rise,
            expected=result.expected,
            perplexity_ratio=perplexity_ratio(before, after),
            loss_ratio=None if head in (CAUSAL_LM, EMBEDDING) else loss_ratio(before, after),
            embedding_loss=mean_loss(after) if head is EMBEDDING else None,
            **speeds,
            plan=plan,
            scores=scores,
            result=after,
            original_speed=before.speed if after.speed else [],
            comparison=comparison,
            failures=failures,
        )


def _point(settings: SweepSettings, **found: object) -> SweepPoint:
    return SweepPoint(**vars(settings) | found)  # type: ignore[arg-type]
