"""Far from the calibration text some ways of making a model smaller seem to better it: how much of that is temperature?

    python experiments/task_aware/confidence.py MODEL --calibration books.txt --development a1.txt --eval-data a2.txt

A model is often too sure of itself on text unlike its training's. Whatever blurs it then lowers its loss there, as a
division of its logits by a temperature above 1 would, with nothing learned and nothing kept. So each result (and the
original) also gets the temperature that is best for it on development text (one per `--eval-data`, in the same order),
and is compared with the original at its own best temperature. The other measure is the divergence from the original's
predictions, KL(original || result), which no loss of certainty can lower.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peers.desk import Desk
from points import Points, described, one_thread, points
from torch import Tensor
from ways import MIX, WAYS, Work

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.data.tokens import PackedTokens

#: Evenly spaced in the logarithm.
TEMPERATURES = [round(math.exp(0.025 * step), 4) for step in range(-8, 25)]
BATCH = 4


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--name", help="of the checkpoint in reports (default: the last part of its path)")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--development", action="append", required=True, help="chooses the temperatures")
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=32, help="of each text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.93, 0.88, 0.82])
    parser.add_argument("--methods", nargs="+", default=["GRASP", "SVD", "MoDeGPT", MIX], choices=WAYS, metavar="WAY")
    parser.add_argument("--report", type=Path, help="default: reports/task_aware/confidence/NAME.json")
    return parser.parse_args()


@dataclass(frozen=True)
class Measured:
    """One model on one text: sums over the tokens of each window."""

    losses: Tensor  #: (temperatures, windows), float64, nats.
    divergence: Tensor  #: (windows,), float64, nats: KL(original || this) at temperature 1.


class Models:
    """Checkpoints of one run as whole models."""

    def __init__(self, run: Points) -> None:
        self._run = run
        self._original = self._whole(run.session.checkpoint)

    def _whole(self, checkpoint: Any) -> Any:
        return self._run.session.stream(checkpoint).load_whole().eval()

    def measure(self, checkpoint: Any) -> dict[str, Measured]:
        """Measure a checkpoint on every text of the run."""
        model = self._whole(checkpoint)
        return {text.name: self._on(model, text) for text in self._run.texts}

    @torch.inference_mode()
    def _on(self, model: Any, text: PackedTokens) -> Measured:
        losses, divergence = [], []
        for rows in torch.arange(text.sequences).split(BATCH):
            ids, valid = text.token_ids[rows], text.valid[rows]
            counts = text.loss_mask[rows, 1:].double()
            found, original = (
                m(ids, attention_mask=valid.long()).logits[:, :-1].float() for m in (model, self._original)
            )
            target = ids[:, 1:].unsqueeze(-1)
            at_each = [
                -(found / temperature).log_softmax(-1).gather(-1, target).squeeze(-1).double()
                for temperature in TEMPERATURES
            ]
            losses.append(torch.stack([(each * counts).sum(-1) for each in at_each]))
            apart = F.kl_div(found.log_softmax(-1), original.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            divergence.append((apart.double() * counts).sum(-1))
        return Measured(torch.cat(losses, dim=1), torch.cat(divergence))


def compared(found: Measured, dense: Measured, chosen: int, dense_chosen: int, tokens: Tensor) -> dict[str, Any]:
    """Return what a result costs on a text, paired by window with the original: at temperature 1 and at the best."""
    whole = TEMPERATURES.index(1.0)
    differences = {
        "extra_loss": found.losses[whole] - dense.losses[whole],
        "extra_loss_tempered": found.losses[chosen] - dense.losses[dense_chosen],
        "divergence": found.divergence,
    }
    return {
        "temperature": TEMPERATURES[chosen],
        **{
            name: {
                "mean": float(each.sum() / tokens.sum()),
                "stderr": float((each / tokens).std() / math.sqrt(len(tokens))),
            }
            for name, each in differences.items()
        },
    }


def token_counts(text: PackedTokens) -> Tensor:
    """Return the number of predicted tokens of each window."""
    return text.loss_mask.sum(dim=1).double()


def rows(run: Points, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the original's row and one for every way and size."""
    work, models = Work(run, Desk(walk=run.bench.walk, new_scratch=run.session.new_scratch)), Models(run)
    pairs = [(Path(a).name, Path(b).name) for a, b in zip(arguments.development, arguments.eval_data, strict=True)]
    counts = {text.name: token_counts(text) for text in run.texts}
    dense = models.measure(run.session.checkpoint)

    def row(found: dict[str, Measured]) -> dict[str, Any]:
        texts = {}
        for development, report in pairs:
            best, dense_best = (int(each[development].losses.sum(dim=1).argmin()) for each in (found, dense))
            texts[report] = compared(found[report], dense[report], best, dense_best, counts[report])
        return texts

    gain = {}
    for development, report in pairs:
        best, whole = int(dense[development].losses.sum(dim=1).argmin()), TEMPERATURES.index(1.0)
        losses = dense[report].losses.sum(dim=1) / counts[report].sum()
        gain[report] = {
            "temperature": TEMPERATURES[best],
            "loss": float(losses[whole]),
            "tempered": float(losses[best]),
        }
    yield {"way": "original", "texts": gain}
    for size in arguments.sizes:
        for name in arguments.methods:
            with work.own_scratch() as own:
                made = WAYS[name](own, size)
                share = made.parameters / run.session.checkpoint.parameters
                yield {"way": name, "asked": size, "size": share, "texts": row(models.measure(made.checkpoint))}


def page(head: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Return the page: one table a text."""
    original, *results = found
    lines = [
        f"# Certainty far from the calibration text: {head['checkpoint']}",
        "",
        "Extra loss (nats per token, paired by window, ± standard error) as it is, and with the temperature that is",
        "best for each model on development text, the original's included; and KL(original || result). Made by",
        "`experiments/task_aware/confidence.py`.",
    ]
    for text, whole in original["texts"].items():
        lines += [
            "",
            f"## {text}",
            "",
            f"The original's loss is {whole['loss']:.3f}; at temperature {whole['temperature']:.2f} it is "
            f"{whole['tempered']:.3f} ({whole['tempered'] - whole['loss']:+.3f}).",
            "",
            "| size | way | extra loss | its temperature | extra loss, both at theirs | divergence |",
            "|---:|---|---:|---:|---:|---:|",
        ]
        for row in results:
            here = row["texts"][text]
            cells = [
                f"{here[key]['mean']:+.4f} ± {here[key]['stderr']:.4f}" for key in ("extra_loss", "extra_loss_tempered")
            ]
            lines.append(
                f"| {row['size']:.0%} | {row['way']} | {cells[0]} | {here['temperature']:.2f} | {cells[1]} | "
                f"{here['divergence']['mean']:.4f} |"
            )
    return "\n".join(lines) + "\n"


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Points]:
    """Yield the run, with all texts in it."""
    if len(arguments.development) != len(arguments.eval_data):
        raise SystemExit("give one --development text for each --eval-data.")
    texts = [*arguments.development, *arguments.eval_data]
    data, windows = arguments.calibration, arguments.eval_windows
    with points(arguments.model, data, texts, seed=arguments.seed, windows=windows, dtype="float32") as run:
        yield run


def main() -> None:
    """Measure all rows of one checkpoint."""
    arguments = options()
    one_thread()
    parts = [part for part in Path(arguments.model).resolve().parts if part != "checkpoint"]
    name = arguments.name or parts[-1]
    report = arguments.report or ROOT / "reports" / "task_aware" / "confidence" / f"{name}.json"
    with opened(arguments) as run:
        head = {
            "checkpoint": name,
            "checkpoint_sha256": run.session.checkpoint.sha256(),
            "seed": arguments.seed,
            "data": {"calibration": described(run.tokens)} | {text.name: described(text) for text in run.texts},
        }
        found = []
        for row in rows(run, arguments):
            found.append(row)
            print(json.dumps(row), flush=True)
    write_report(report, {**head, "rows": found})
    report.with_suffix(".md").write_text(page(head, found), encoding="utf-8")


if __name__ == "__main__":
    main()
