"""Loss against parameters: what each way of making a model smaller costs at the same size, on the same tokens.

    python experiments/task_aware/sizes.py MODEL --calibration books.txt --eval-data held-out.txt --eval-data ...

At each size (a fraction of the parameters) the methods that operate on a number of layers take the fewest layers
that leave at most a fifth of each: published methods those that block influence chooses, `fisher` those that its scorer
chooses. `mix` cuts all layers; `mix, one width` gives the MLPs of all layers one width, so that the result is a plain
checkpoint. Budgets are the same to one rank or a few channels. Results are appended; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from points import Points, described, evaluate, one_thread, paired, points

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.config import BudgetConfig, SearchConfig
from layer_surgery.runs.bench import general_text
from layer_surgery.surgeon import make_plan, model_shape, plan_for_all_layers

KEPT = 0.2
#: name -> (method, refit, layers of block influence rather than of the scorer, options of the search)
WAYS: dict[str, tuple[str, bool, bool, SearchConfig]] = {
    "GRASP": ("grasp", False, True, SearchConfig()),
    "SVD-LLM": ("svd_llm", False, True, SearchConfig()),
    "fisher + refit": ("fisher", True, False, SearchConfig()),
    "mix, one width + refit": ("mix", True, False, SearchConfig(uniform=True)),
    "mix": ("mix", False, False, SearchConfig()),
    "mix + refit": ("mix", True, False, SearchConfig()),
}


def operated_layers(run: Points, size: float, by_influence: bool) -> list[int]:
    """Return the fewest layers that leave at most `KEPT` of each at this size."""
    shape = model_shape(run.session.checkpoint)
    each = max(layer.parameters for layer in shape.layers) / shape.parameters
    count = math.ceil((1 - size) / ((1 - KEPT) * each) - 1e-9)
    return run.order("block_influence" if by_influence else "fisher", count, KEPT, refit=not by_influence)


def measure(run: Points, size: float, name: str) -> dict[str, Any]:
    """Make the model smaller in one way, and measure it."""
    method, refit, by_influence, search = WAYS[name]
    shape, budget = model_shape(run.session.checkpoint), BudgetConfig(target_parameters=size)
    layers = None if method == "mix" else operated_layers(run, size, by_influence)
    plan = plan_for_all_layers(shape, budget, method) if layers is None else make_plan(shape, layers, budget, method)
    bench = replace(run.bench, general=general_text(run.session, run.tokens, 0.25) if refit else None)
    start = time.perf_counter()
    done = bench.operate(plan, method, "all" if refit else None, search=search)
    seconds = time.perf_counter() - start
    losses = evaluate(run.session, done.checkpoint, run.texts)
    return {
        "way": name,
        "size": size,
        "parameters": done.checkpoint.parameters,
        "layers": layers,
        "plan": [{"action": layer.action, **layer.kept} for layer in done.plan.layers],
        "predicted_loss_rise": done.plan.predicted_loss_rise,
        "seconds": round(seconds, 2),
        "extra_loss": {text: paired(losses[text], run.dense[text]) for text in losses},
    }


def main() -> None:
    """Measure all points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=96)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.93, 0.88, 0.82, 0.76, 0.65, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "task_aware" / "sizes.json")
    arguments = parser.parse_args()
    one_thread()
    found = json.loads(arguments.report.read_text()) if arguments.report.exists() else {}
    rows: list[dict[str, Any]] = found.get("rows", [])
    data: dict[str, Any] = found.get("data", {})
    known = {(row["seed"], row["size"], row["way"]) for row in rows}
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
            for size in arguments.sizes:
                for name in WAYS:
                    if (seed, size, name) in known:
                        continue
                    try:
                        row = measure(run, size, name)
                    except ValueError as error:  # a size that this way cannot reach
                        print(seed, size, name, error, flush=True)
                        continue
                    rows.append({"seed": seed, **row})
                    rises = {text: round(value["rise"], 4) for text, value in row["extra_loss"].items()}
                    print(seed, size, name, row["parameters"], rises, row["seconds"], flush=True)
                    write_report(arguments.report, {"checkpoint": arguments.model, "data": data, "rows": rows})


if __name__ == "__main__":
    main()
