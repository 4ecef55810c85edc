"""Every method at every target, on the same calibration tokens, the same layers count and the same budget.

    python experiments/task_aware/compare.py MODEL --calibration books.txt --eval-data held-out.txt --eval-data ...

For each seed (which draws the calibration windows) and target, published methods operate on the layers that block
influence chooses (their papers' setting), ours on those that `--scorer` chooses, and GRASP on those too. All low-rank
points of a target have the same budget. Results are appended to the report as they come, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from points import described, one_thread, points

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

#: (method, layers chosen by block influence rather than by ours, refit)
POINTS = [
    ("remove", True, False),
    ("laco", True, False),
    ("replaceme", True, False),
    ("svd", True, False),
    ("grasp", True, False),
    ("grasp_sequential", True, False),
    ("svd_llm", True, False),
    ("fisher", True, False),
    ("fisher", False, False),
    ("remove", False, True),
    ("fisher", False, True),
]


#: Methods that look at no data: measured once for each choice of layers.
WITHOUT_DATA = ("remove", "laco", "svd")


def main() -> None:
    """Measure all points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=48)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target-layers", type=int, nargs="+", default=[11, 10, 9, 8])
    parser.add_argument("--no-refit", action="store_true", help="leave the points with a refit for a later run")
    parser.add_argument("--scorer", default="fisher")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "task_aware" / "compare.json")
    arguments = parser.parse_args()
    one_thread()
    found = json.loads(arguments.report.read_text()) if arguments.report.exists() else {}
    rows: list[dict[str, Any]] = found.get("rows", [])
    known = {(r["seed"], r["target_layers"], r["method"], r["published_layers"], r["refit"]) for r in rows}
    data: dict[str, Any] = found.get("data", {})
    for seed in arguments.seeds:
        with points(
            arguments.model,
            arguments.calibration,
            arguments.eval_data,
            seed=seed,
            samples=arguments.samples,
            windows=arguments.eval_windows,
        ) as run:
            data[f"calibration, seed {seed}"] = described(run.tokens)
            data |= {text.name: described(text) for text in run.texts}
            depth = run.session.checkpoint.layer_count
            most = depth - min(arguments.target_layers)
            start = time.perf_counter()
            ours = run.order(arguments.scorer, most, arguments.keep, refit=True)
            statistics_seconds = round(time.perf_counter() - start, 2)
            published = run.order("block_influence", most, arguments.keep, refit=False)
            print(f"seed {seed}: ours {ours}, block influence {published}", flush=True)
            for target in arguments.target_layers:
                for method, by_influence, refit in POINTS:
                    if (seed, target, method, by_influence, refit) in known or (refit and arguments.no_refit):
                        continue
                    layers = (published if by_influence else ours)[: depth - target]
                    same = [r for r in rows if r["method"] == method and r["layers"] == sorted(layers)]
                    if method in WITHOUT_DATA and not refit and same:
                        row = dict(same[0])
                    else:
                        row = run.measure(layers, method, arguments.keep, refit=refit)
                    row |= {"seed": seed, "target_layers": target, "published_layers": by_influence}
                    row |= {"statistics_seconds": statistics_seconds}
                    rows.append(row)
                    rises = {name: round(value["rise"], 4) for name, value in row["extra_loss"].items()}
                    print(seed, target, method, "refit" if refit else "", row["layers"], rises, flush=True)
                    write_report(arguments.report, {"checkpoint": arguments.model, "data": data, "rows": rows})


if __name__ == "__main__":
    main()
