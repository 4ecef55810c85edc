"""Which part buys what: at one target and budget, one part of the method after the other, and each setting swept.

    python experiments/task_aware/ablation.py --calibration books.txt --eval-data held-out.txt --eval-data other.txt

Writes reports/task_aware/ablation.json. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from points import Points, described, one_thread, points

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.calibration import damping
from layer_surgery.linalg import least_squares
from layer_surgery.surgeon import refit

SAMPLES = (16, 32, 64, 128, 256, 512)
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)
DAMPINGS = (1e-6, 1e-4, 1e-2, 0.1)


@contextmanager
def outputs_only() -> Iterator[None]:
    """Refit output projections only, as if nothing that reads the stream could be re-solved."""
    with mock.patch.object(refit._Pair, "_follow_outputs", return_value=None):
        yield


@contextmanager
def one_ridge(ridge: float) -> Iterator[None]:
    """Take this ridge for every matrix, instead of choosing on held-out windows."""
    with mock.patch.object(least_squares, "RIDGES", (ridge,)):
        yield


@contextmanager
def one_damping(share: float) -> Iterator[None]:
    """Draw every moment this far towards the identity, instead of the share estimated from the data."""

    def fixed(moment: torch.Tensor, _tokens: int) -> torch.Tensor:
        result = (1 - share) * moment
        result.diagonal().add_(share * float(moment.trace()) / len(moment))
        return result

    with mock.patch.object(damping, "shrunk", fixed):
        yield


def parts(run: Points, add: Callable[..., None], published: list[int], ours: list[int], keep: float) -> None:
    """Measure one part of the method after the other."""
    steps: list[tuple[str, dict[str, Any]]] = [
        ("svd", {"layers": published, "method": "svd"}),
        ("+ inputs' moments (svd_llm)", {"layers": published, "method": "svd_llm"}),
        ("+ gradients' moments, uniform ranks", {"layers": published, "ranks_fixed": True}),
        ("+ one knapsack over all ranks", {"layers": published}),
        ("+ layers by coupled cost", {"layers": ours}),
        ("+ refit of output projections", {"layers": ours, "refit": True, "general": 0.0}),
        ("+ refit of all linears", {"layers": ours, "refit": True, "general": 0.0}),
        ("+ a quarter of general text", {"layers": ours, "refit": True}),
    ]
    for name, options in steps:
        arguments = {"method": "fisher", "keep": keep, "refit": False} | options
        with outputs_only() if "output projections" in name else nullcontext():
            add(run, "parts", name, lambda arguments=arguments: run.measure(**arguments))


def main() -> None:
    """Measure all points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=48)
    parser.add_argument("--target-layers", type=int, default=9)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--only", nargs="+", default=["parts", "tokens", "ridge", "damping"])
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES), help="for the part `tokens`")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "task_aware" / "ablation.json")
    arguments = parser.parse_args()
    one_thread()
    found = json.loads(arguments.report.read_text()) if arguments.report.exists() else {}
    rows: list[dict[str, Any]] = found.get("rows", [])
    data: dict[str, Any] = found.get("data", {})

    def opened(samples: int) -> Any:
        return points(
            arguments.model,
            arguments.calibration,
            arguments.eval_data,
            samples=samples,
            windows=arguments.eval_windows,
        )

    def add(run: Points, part: str, setting: str, point: Callable[[], dict[str, Any]]) -> None:
        if any(row["part"] == part and row["setting"] == setting for row in rows):
            return
        row = point() | {"part": part, "setting": setting, "tokens": int(run.tokens.valid.sum())}
        rows.append(row)
        data.update({text.name: described(text) for text in run.texts})
        print(part, setting, {n: round(v["rise"], 4) for n, v in row["extra_loss"].items()}, flush=True)
        write_report(arguments.report, {"checkpoint": arguments.model, "data": data, "rows": rows})

    keep = arguments.keep
    with opened(128) as run:
        gone = run.session.checkpoint.layer_count - arguments.target_layers
        ours = run.order("fisher", gone, keep, refit=True)
        published = run.order("block_influence", gone, keep, refit=False)
        if "parts" in arguments.only:
            parts(run, add, published, ours, keep)
        for ridge in RIDGES if "ridge" in arguments.only else ():
            with one_ridge(ridge):
                add(run, "ridge", f"{ridge:g}", lambda: run.measure(ours, "fisher", keep, refit=True))
    for samples in (16, 128) if "damping" in arguments.only else ():
        for share in DAMPINGS:
            with one_damping(share), opened(samples) as run:
                name = f"{share:g}, {samples} sequences"
                add(run, "damping", name, lambda run=run: run.measure(ours, "fisher", keep, refit=False))
        with opened(samples) as run:
            name = f"estimated, {samples} sequences"
            add(run, "damping", name, lambda run=run: run.measure(ours, "fisher", keep, refit=False))
    for samples in arguments.samples if "tokens" in arguments.only else ():
        with opened(samples) as run:
            for with_refit in (False, True):
                name = f"{samples} sequences" + (", refit" if with_refit else "")
                add(run, "tokens", name, lambda run=run, r=with_refit: run.measure(ours, "fisher", keep, refit=r))


if __name__ == "__main__":
    main()
