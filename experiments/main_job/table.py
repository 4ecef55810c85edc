"""The honest table: what each method costs at each size.

    python experiments/main_job/table.py MODEL --eval-data bundled --eval-data books.txt ...

Every combination of target layers, keep, method and scorer, on the same calibration tokens and the same evaluation
windows, in one run. Points that are the same model (keep 0 is removal under every method) are measured once.
Losses stay in the table. Writes reports/main_job/table.json and table.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from measuring import size_and_perplexity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.config import BudgetConfig, CalibrationConfig, EvaluationConfig, RuntimeConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.progress import Ui
from layer_surgery.records import EvaluationResult
from layer_surgery.runs.operation import operate, statistics_source
from layer_surgery.runs.session import Session, calibration_walk, open_session
from layer_surgery.scoring import SCORERS, ScoringContext
from layer_surgery.surgeon import METHODS, make_plan, model_shape

METHOD_NAMES = ("svd", "fisher", "grasp", "grasp_sequential")


def removal_order(session: Session, tokens: PackedTokens, scorer: str, count: int) -> list[int]:
    """Return the `count` layers that a scorer removes first. Shorter targets take the beginning of the list, which is
    what a ranking and a greedy search would have given for them."""
    with calibration_walk(session, session.stream(session.checkpoint), tokens) as walk:
        context = ScoringContext(
            walk=walk, count=count, seed=0, statistics=statistics_source(session, "", None), keep=0.1, refit=False
        )
        scores = SCORERS[scorer].scores(context)
    return scores.removal_order[:count]


def measure(
    session: Session, tokens: PackedTokens, texts: list[PackedTokens], layers: list[int], keep: float, method: str
) -> dict[str, Any]:
    """Operate and evaluate one point."""
    plan = make_plan(model_shape(session.checkpoint), layers, BudgetConfig(keep=keep), method)
    start = time.perf_counter()
    with calibration_walk(session, session.stream(session.checkpoint), tokens) as walk:
        statistics = statistics_source(session, "", None)
        done = operate(session, walk, plan, METHODS[method], statistics)
    seconds = time.perf_counter() - start
    result = size_and_perplexity(session, done.checkpoint, texts)
    return {
        "parameters": result.parameters,
        "parameter_bound": done.plan.parameter_bound,
        "seconds_to_operate": round(seconds, 2),
        "perplexity": {name: asdict(value) for name, value in result.perplexity.items()},
    }


def table(before: EvaluationResult, rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown; extra loss is log(perplexity / dense) in nats per token."""
    names = list(before.perplexity)
    short = [Path(name).stem for name in names]
    lines = [
        "| target layers | scorer | layers | keep | method | parameters | " + " | ".join(short) + " | extra loss |",
        "|---|---|---|---|---|---|" + "---|" * len(names) + "---|",
        f"| 12 | | | | dense | {before.parameters:,} | "
        + " | ".join(f"{p.value:.2f} ± {p.stderr:.2f}" for p in before.perplexity.values())
        + " | |",
    ]
    for row in rows:
        cells = [row["perplexity"][name] for name in names]
        extra = [math.log(c["value"] / before.perplexity[n].value) for n, c in zip(names, cells, strict=True)]
        lines.append(
            f"| {row['target_layers']} | {row['scorer']} | {', '.join(map(str, row['layers']))} | {row['keep']} "
            f"| {row['method']} | {row['parameters']:,} | "
            + " | ".join(f"{c['value']:.2f} ± {c['stderr']:.2f}" for c in cells)
            + f" | {' / '.join(f'{e:.3f}' for e in extra)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--eval-data", action="append", default=[])
    parser.add_argument("--eval-windows", type=int, default=256)
    parser.add_argument("--target-layers", type=int, nargs="+", default=[11, 10, 9, 8])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--scorers", nargs="+", default=["block_influence", "perplexity"])
    parser.add_argument("--calibration", action="append", default=[], metavar="SOURCE[:WEIGHT]")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "main_job" / "table.json")
    arguments = parser.parse_args()
    runtime = RuntimeConfig()
    with open_session(arguments.model, None, runtime, Ui(note=print), None) as session:
        tokens = session.calibration_tokens(
            CalibrationConfig(sources=tuple(arguments.calibration or ["bundled"]), samples=arguments.samples)
        )
        evaluation = EvaluationConfig(
            sources=tuple(arguments.eval_data or ["bundled"]), max_windows=arguments.eval_windows
        )
        texts = [replace(text, name=Path(text.name).name) for text in session.evaluation_tokens(evaluation)]
        before = size_and_perplexity(session, session.checkpoint, texts)
        rows: list[dict[str, Any]] = []
        done: dict[tuple[Any, ...], dict[str, Any]] = {}
        depth = session.checkpoint.layer_count
        most = depth - min(arguments.target_layers)
        orders = {name: removal_order(session, tokens, name, most) for name in arguments.scorers}
        print(orders, flush=True)
        for target, scorer in itertools.product(arguments.target_layers, arguments.scorers):
            layers = sorted(orders[scorer][: depth - target])
            for keep in arguments.keep:
                for method in METHOD_NAMES if keep else ("remove",):
                    key = (tuple(layers), keep, method)
                    if key not in done:
                        done[key] = measure(session, tokens, texts, layers, keep, method)
                    point = {"target_layers": target, "scorer": scorer, "layers": layers, "keep": keep}
                    rows.append(point | {"method": method} | done[key])
                    print(
                        point, method, {n: round(p["value"], 2) for n, p in done[key]["perplexity"].items()}, flush=True
                    )
    calibration = {"name": tokens.name, "sha256": tokens.sha256, "tokens": int(tokens.valid.sum())}
    write_report(
        arguments.report,
        {"calibration": calibration, "dense": asdict(before), "rows": rows, "checkpoint": arguments.model},
    )
    arguments.report.with_suffix(".md").write_text(table(before, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
