"""The least ridge that the refit may choose: what it gains on text, and how large it lets weights become.

    python experiments/task_aware/ridges.py MODEL [MODEL ...] --calibration books.txt --eval-data held-out.txt

Each model is compressed in the ways of `CASES` with other least ridges (`RIDGES` of `linalg/least_squares.py` from
there on). Rises of the loss are paired by window with the original's. Weights are compared with the original's of the
same shape: the largest ratio of their norms, and their largest value. What 8 and 4 bits (of each row, by its largest
value) add to the loss is measured too. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from points import evaluate, one_thread, paired
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, write_report

import layer_surgery
from layer_surgery.config import EvaluationConfig, RuntimeConfig
from layer_surgery.linalg import least_squares
from layer_surgery.runs.session import open_session

HIGHEST = 6  # in half powers of ten, as below
CASES: dict[str, dict[str, Any]] = {
    "few layers removed": {"share_of_layers": 5 / 6, "keep": 0},
    "few layers": {"share_of_layers": 3 / 4},
    "65 % of parameters": {"target_parameters": 0.65},
}
PROJECTIONS = "down_proj.weight"


def main() -> None:
    """Measure all points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=48, help="of each text")
    parser.add_argument("--samples", type=int, nargs="+", default=[128])
    parser.add_argument("--least", type=int, nargs="+", default=[-12, -6, -4, -2], help="half powers of ten")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "task_aware" / "ridges.json")
    arguments = parser.parse_args()
    one_thread()
    rows = json.loads(arguments.report.read_text(encoding="utf-8"))["rows"] if arguments.report.exists() else []
    with tempfile.TemporaryDirectory() as cache:
        for model in arguments.models:
            name = [part for part in Path(model).resolve().parts if part != "checkpoint"][-1]
            for samples in arguments.samples:
                for least in arguments.least:
                    for case in CASES:
                        key = {"checkpoint": name, "samples": samples, "least_ridge": 10 ** (least / 2), "case": case}
                        if not any(row.items() >= key.items() for row in rows):
                            rows.append(key | measured(arguments, model, samples, least, case, Path(cache)))
                            print(json.dumps(rows[-1]), flush=True)
                            write_report(arguments.report, {"rows": rows})


def measured(
    arguments: argparse.Namespace, model: str, samples: int, least: int, case: str, cache: Path
) -> dict[str, Any]:
    """Compress with a least ridge, and measure."""
    options = dict(CASES[case])
    if share := options.pop("share_of_layers", None):
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        options["target_layers"] = round(share * config["num_hidden_layers"])
    ridges = tuple(10 ** (exponent / 2) for exponent in range(least, HIGHEST + 1))
    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(least_squares, "RIDGES", ridges):
        output = Path(temporary) / "output"
        report = layer_surgery.compress(
            model, output, calibration=arguments.calibration, samples=samples, eval_data=None, cache=cache, **options
        )
        weights = down_projections(output)
        before = {tuple(w.shape): max(float(w.norm()), 1e-9) for w in down_projections(Path(model)).values()}
        # A narrowed projection has another shape; any of the original's will do, as they are alike.
        whole = max(before.values())
        chosen = [record.ridge for record in report.refit]
        return {
            "rise": rises(arguments, model, output),
            "rise_in_8_bits": rises(arguments, model, in_bits(output, Path(temporary) / "eight", 8)),
            "rise_in_4_bits": rises(arguments, model, in_bits(output, Path(temporary) / "four", 4)),
            "largest_norm_of_original": round(whole, 2),
            "largest_norm": round(max(float(w.norm()) for w in weights.values()), 2),
            "largest_weight": round(max(float(w.abs().max()) for w in weights.values()), 3),
            "ridges_at_the_least": sum(ridge == ridges[0] for ridge in chosen),
            "linears": len(chosen),
        }


def down_projections(directory: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint that MLPs write with, in float32."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= {name: tensor.float() for name, tensor in load_file(file).items() if PROJECTIONS in name}
    return found


def in_bits(directory: Path, output: Path, bits: int) -> Path:
    """Copy a checkpoint with the weights of its layers' linears rounded, each row by its largest value."""
    from safetensors.torch import save_file

    output.mkdir()
    for file in directory.iterdir():
        if file.suffix == ".safetensors":
            save_file(
                {name: rounded(name, tensor, bits) for name, tensor in load_file(file).items()}, output / file.name
            )
        elif file.is_file() and file.name != "surgery.json":
            (output / file.name).write_bytes(file.read_bytes())
    return output


def rounded(name: str, tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a linear's weight rounded symmetrically to so many bits; anything else as it is."""
    if tensor.ndim != 2 or ".layers." not in name:
        return tensor
    scale = tensor.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return ((tensor.float() / scale).round() * scale).to(tensor.dtype)


def rises(arguments: argparse.Namespace, model: str, directory: Path) -> dict[str, Any]:
    """Return the rise of the loss on each text, paired with the original's."""
    found = {}
    config = EvaluationConfig(eval_data=arguments.eval_data, eval_windows=arguments.eval_windows)
    for each in (model, str(directory)):
        with open_session(each, RuntimeConfig()) as session:
            found[each] = evaluate(session, session.checkpoint, session.evaluation_tokens(config))
    return {
        Path(text).name: {
            key: round(value, 5)
            for key, value in paired(losses, found[model][text]).items()
            if key in ("rise", "stderr")
        }
        for text, losses in found[str(directory)].items()
    }


if __name__ == "__main__":
    main()
