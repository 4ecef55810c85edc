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
import tempfile
import time
from pathlib import Path

from measuring import size_and_perplexity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.config import BudgetConfig, CalibrationConfig, EvaluationConfig, RuntimeConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.progress import Ui
from layer_surgery.records import SurgeryPlan
from layer_surgery.runs.operation import statistics_source
from layer_surgery.runs.session import Session, calibration_walk, open_session
from layer_surgery.surgeon import METHODS, FactorStore, SurgeryContext, make_plan, model_shape
from layer_surgery.walk.gradients import accumulated_gradients
from layer_surgery.walk.walk import Observer


class AllGradients(Observer):
    """Takes the gradients of all linears, as a training step would."""

    def watching(self, index, layer):  # type: ignore[no-untyped-def]
        return accumulated_gradients({name: p for name, p in layer.named_parameters() if p.dim() == 2})


def whole_pass(session: Session, tokens: PackedTokens) -> float:
    """Return the seconds of one forward and backward over the whole model."""
    start = time.perf_counter()
    with calibration_walk(session, session.stream(session.checkpoint), tokens) as walk:
        walk.backpropagate([AllGradients()])
    return time.perf_counter() - start


def operate(session: Session, tokens: PackedTokens, plan: SurgeryPlan, method: str, directory: Path) -> float:
    """Return the seconds that a method takes from an opened checkpoint to factors."""
    factors = FactorStore(directory, session.checkpoint.dtype)
    start = time.perf_counter()
    with calibration_walk(session, session.stream(session.checkpoint), tokens) as walk:
        METHODS[method].function(
            plan,
            SurgeryContext(walk=walk, factors=factors, statistics=statistics_source(session, "", None)),
        )
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
    with open_session(arguments.model, None, RuntimeConfig(device=arguments.device), Ui(note=print), None) as session:
        tokens = session.calibration_tokens(CalibrationConfig(sources=tuple(arguments.calibration or ["bundled"])))
        texts = session.evaluation_tokens(
            EvaluationConfig(sources=tuple(arguments.eval_data or ["bundled"]), max_windows=arguments.eval_windows)
        )
        plan = make_plan(model_shape(session.checkpoint), arguments.layers, BudgetConfig(keep=arguments.keep), "grasp")
        for repeat in range(arguments.repeats):
            times["one whole pass"].append(whole_pass(session, tokens))
            for method in ("grasp", "grasp_sequential"):
                with tempfile.TemporaryDirectory(dir=session.scratch) as directory:
                    times[method].append(operate(session, tokens, plan, method, Path(directory)))
                    print(method, times[method][-1], flush=True)
                    if repeat == 0:
                        factors = FactorStore(Path(directory), session.checkpoint.dtype)
                        result = size_and_perplexity(
                            session, result_checkpoint(session.checkpoint, plan, factors), texts
                        )
                        quality[method] = {Path(n).name: round(p.value, 4) for n, p in result.perplexity.items()}
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
