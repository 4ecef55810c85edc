"""How long does GRASP take from one backward walk, against recomputing after every replaced part?

    python experiments/main_job/speed.py [MODEL] --eval-data FILE ... [--repeats 3]

Four layers are replaced, 128 x 256 calibration tokens, in one process, interleaved, medians of `--repeats`:

- `grasp`: one forward and one backward walk for everything;
- `grasp_sequential`: as the paper does it, a new gradient before each MLP and each attention, but with our walk, which
  uses the boundaries below the layer at hand again;
- `whole passes`: what the original's schedule costs: two passes of forward and backward over the whole model for each
  replaced layer (time of one such pass, measured here, times two times the number of layers).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.config import BudgetConfig, CalibrationConfig, EvaluationConfig, RuntimeConfig
from layer_surgery.evaluation.perplexity import summarise, window_losses
from layer_surgery.progress import Ui
from layer_surgery.runs.bench import Bench, open_bench
from layer_surgery.runs.session import open_session
from layer_surgery.surgeon import make_plan, model_shape
from layer_surgery.walk.gradients import accumulated_gradients
from layer_surgery.walk.observer import Observer


class AllGradients(Observer):
    """Takes the gradients of all linears, as a training step would."""

    def watching(self, index, layer):  # type: ignore[no-untyped-def]
        return accumulated_gradients({name: p for name, p in layer.named_parameters() if p.dim() == 2})


def whole_pass(bench: Bench) -> float:
    """Return the seconds of one forward and backward over the whole model."""
    start = time.perf_counter()
    bench.walk.backpropagate([AllGradients()])
    return time.perf_counter() - start


def main() -> None:
    """Measure times and perplexities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--eval-data", action="append", default=[])
    parser.add_argument("--eval-windows", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6, 9])
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--calibration", action="append", default=[], metavar="SOURCE[:WEIGHT]")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "main_job" / "speed.json")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {"grasp": [], "grasp_sequential": [], "one whole pass": []}
    quality: dict[str, dict[str, float]] = {}
    data = CalibrationConfig(calibration=arguments.calibration or "bundled")
    texts = EvaluationConfig(eval_data=arguments.eval_data or "bundled", eval_windows=arguments.eval_windows)
    with open_session(arguments.model, RuntimeConfig(device=arguments.device, ui=Ui(note=print))) as session:
        tokens, packed = session.calibration_tokens(data), session.evaluation_tokens(texts)
        plan = make_plan(model_shape(session.checkpoint), arguments.layers, BudgetConfig(keep=arguments.keep), "grasp")
        for repeat in range(arguments.repeats):
            with open_bench(session, tokens, data) as bench:
                times["one whole pass"].append(whole_pass(bench))
            for method in ("grasp", "grasp_sequential"):
                start = time.perf_counter()
                with open_bench(session, tokens, data) as bench:
                    done = bench.operate(plan, method)
                times[method].append(time.perf_counter() - start)
                print(method, times[method][-1], flush=True)
                if repeat == 0:
                    model = session.stream(done.checkpoint)
                    quality[method] = {
                        Path(text.name).name: round(
                            summarise(window_losses(model, text, session.settings), text).value, 4
                        )
                        for text in packed
                    }
    median = {name: statistics.median(values) for name, values in times.items()}
    whole = 2 * len(arguments.layers) * median["one whole pass"]
    results = {
        "layers": arguments.layers,
        "keep": arguments.keep,
        "parameters": plan.parameters,
        "seconds": {name: [round(v, 3) for v in values] for name, values in times.items()},
        "median_seconds": {name: round(value, 3) for name, value in median.items()},
        "whole_passes_seconds": round(whole, 3),
        "sequential_over_grasp": round(median["grasp_sequential"] / median["grasp"], 2),
        "whole_passes_over_grasp": round(whole / median["grasp"], 2),
        "perplexity": quality,
    }
    print(results)
    write_report(arguments.report, results, arguments.device)


if __name__ == "__main__":
    main()
