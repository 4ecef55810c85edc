"""What it costs in time: statistics, surgery and refit, against a forward and backward pass of the whole model.

    python experiments/task_aware/cost.py MODEL

The yardstick is the model's own forward and backward pass with gradient checkpointing on the same tokens, with
gradients for all of its weights. All are timed in turn, in one process; the report has the medians and their ratios.
"""

from __future__ import annotations

import argparse
import statistics as numbers
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from points import one_thread
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.calibration.statistics import useful_ranks
from layer_surgery.config import BudgetConfig, CalibrationConfig, RuntimeConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.progress import Ui
from layer_surgery.runs.operation import operate, refit_data
from layer_surgery.runs.session import Session, calibration_walk, open_session
from layer_surgery.surgeon import METHODS, make_plan, model_shape


def whole_model(path: str, tokens: PackedTokens, batch_size: int) -> float:
    """Return the seconds of one forward and backward pass over all tokens, in float32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()  # checkpointing is on in training only; these models have no dropout
    start = time.perf_counter()
    for rows in tokens.batches(batch_size):
        ids = tokens.token_ids[rows]
        model(ids, labels=ids, use_cache=False).loss.backward()
    return time.perf_counter() - start


def surgery(session: Session, tokens: PackedTokens, layers: list[int], keep: float) -> dict[str, float]:
    """Return the seconds of the statistics of all layers, of the surgery, and of the refit."""
    seconds: dict[str, float] = {}
    with (
        calibration_walk(session, session.stream(session.checkpoint), tokens) as walk,
        tempfile.TemporaryDirectory(dir=session.scratch) as scratch,
    ):
        source = StatisticsSource(Path(scratch), session.checkpoint.dtype)
        start = time.perf_counter()
        source.get(walk, useful_ranks(walk.model, range(walk.model.layer_count)))
        seconds["statistics"] = time.perf_counter() - start
        plan = make_plan(model_shape(session.checkpoint), layers, BudgetConfig(keep=keep), "fisher")
        data = refit_data(session, tokens, "all", 0.25)
        for name, looked_at in (("surgery", None), ("surgery and refit", data)):
            start = time.perf_counter()
            operate(session, walk, plan, METHODS["fisher"], source, refit_data=looked_at)
            seconds[name] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Time everything in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "task_aware" / "cost.json")
    arguments = parser.parse_args()
    one_thread()
    runs: list[dict[str, float]] = []
    with open_session(arguments.model, None, RuntimeConfig(), Ui(), None) as session:
        tokens = session.calibration_tokens(CalibrationConfig(samples=arguments.samples))
        for _ in range(arguments.repeats):
            seconds = {"forward and backward": whole_model(arguments.model, tokens, 8)}
            seconds |= surgery(session, tokens, arguments.layers, arguments.keep)
            runs.append(seconds)
            print({name: round(value, 1) for name, value in seconds.items()}, flush=True)
    ratios = {
        "statistics / forward and backward": [r["statistics"] / r["forward and backward"] for r in runs],
        "surgery and refit / statistics": [r["surgery and refit"] / r["statistics"] for r in runs],
    }
    results: dict[str, Any] = {
        "seconds": {name: numbers.median(run[name] for run in runs) for name in runs[0]},
        "ratios": {name: numbers.median(values) for name, values in ratios.items()},
        "runs": runs,
        "tokens": int(tokens.valid.sum()),
        "layers": arguments.layers,
    }
    write_report(arguments.report, results)


if __name__ == "__main__":
    main()
