"""One point of a comparison: operate on given layers by a method, refit or not, and measure. Shared by the scripts."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.config import BudgetConfig, CalibrationConfig, EvaluationConfig, RuntimeConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.progress import Ui
from layer_surgery.runs.operation import operate, refit_data, statistics_source
from layer_surgery.runs.session import Session, calibration_walk, open_session
from layer_surgery.scoring import SCORERS, ScoringContext
from layer_surgery.surgeon import METHODS, make_plan, model_shape
from layer_surgery.walk.walk import Losses, Walk

REMOVING = tuple(entry.name for entry in METHODS if entry.removes)


@dataclass
class Bench:
    """One model, one set of calibration tokens, several evaluation texts."""

    session: Session
    tokens: PackedTokens
    walk: Walk
    texts: list[PackedTokens]
    statistics: StatisticsSource
    dense: dict[str, Losses]

    def order(self, scorer: str, count: int, keep: float, *, refit: bool) -> list[int]:
        """Return the layers that a scorer would remove."""
        context = ScoringContext(
            walk=self.walk, count=count, seed=0, statistics=self.statistics, keep=keep or 0.1, refit=refit
        )
        return SCORERS[scorer].scores(context).removal_order[:count]

    def measure(
        self,
        layers: Sequence[int],
        method: str,
        keep: float,
        *,
        refit: bool,
        general: float = 0.25,
        ranks_fixed: bool = False,
    ) -> dict[str, Any]:
        """Operate and evaluate; return sizes, losses and times."""
        keep = 0.0 if method in REMOVING else keep
        plan = make_plan(model_shape(self.session.checkpoint), layers, BudgetConfig(keep=keep), method)
        data = refit_data(self.session, self.tokens, "all", general) if refit else None
        start = time.perf_counter()
        done = operate(
            self.session, self.walk, plan, METHODS[method], self.statistics, refit_data=data, ranks_fixed=ranks_fixed
        )
        seconds = time.perf_counter() - start
        losses = evaluate(self.session, done.checkpoint, self.texts)
        return {
            "method": method,
            "refit": refit,
            "layers": sorted(layers),
            "keep": keep,
            "parameters": done.checkpoint.parameters,
            "predicted_loss_rise": done.plan.predicted_loss_rise,
            "seconds": round(seconds, 2),
            "extra_loss": {name: paired(losses[name], self.dense[name]) for name in losses},
        }


def evaluate(session: Session, checkpoint: Any, texts: Sequence[PackedTokens]) -> dict[str, Losses]:
    """Return the losses of every window of every text."""
    model, losses = session.stream(checkpoint), {}
    for tokens in texts:
        with Walk(model, tokens, session.settings) as walk:
            losses[tokens.name] = walk.losses(walk.forward(list(range(model.layer_count)), keep=False))
    return losses


def paired(losses: Losses, dense: Losses) -> dict[str, float]:
    """Return the rise of the mean loss with its standard error over windows, paired, and both perplexities."""
    windows = (losses.sums - dense.sums) / dense.tokens
    return {
        "rise": losses.mean - dense.mean,
        "stderr": float(windows.std() / math.sqrt(len(windows))),
        "perplexity": math.exp(losses.mean),
        "dense": math.exp(dense.mean),
    }


@contextmanager
def bench(
    model: str,
    calibration: Sequence[str],
    texts: Sequence[str],
    *,
    seed: int = 0,
    samples: int = 128,
    windows: int | None = None,
    dtype: str = "auto",
) -> Iterator[Bench]:
    """Open everything that points need."""
    runtime = RuntimeConfig(seed=seed, dtype=dtype)
    with open_session(model, None, runtime, Ui(), None) as session:
        tokens = session.calibration_tokens(CalibrationConfig(sources=tuple(calibration), samples=samples))
        packed = session.evaluation_tokens(EvaluationConfig(sources=tuple(texts), max_windows=windows))
        packed = [replace(text, name=Path(text.name).name) for text in packed]
        dense = evaluate(session, session.checkpoint, packed)
        with calibration_walk(session, session.stream(session.checkpoint), tokens) as walk:
            statistics = statistics_source(session, "", None)
            yield Bench(session, tokens, walk, packed, statistics, dense)


def described(tokens: PackedTokens) -> dict[str, Any]:
    """Return what a report says about data."""
    return {"name": Path(tokens.name).name, "sha256": tokens.sha256, "tokens": int(tokens.valid.sum())}


def one_thread() -> None:
    """Compute on one thread: results then do not depend on how busy the machine is, and times less."""
    torch.set_num_threads(1)
