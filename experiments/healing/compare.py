"""What each way of healing gains in the same time, from the same result of surgery.

    python experiments/healing/compare.py MODEL --data train.txt --eval-data held-out.txt --minutes 10 --seeds 0 1 2

For each seed the model is compressed by the default method, by plain removal and by GRASP, all calibrated on the data;
the unhealed default is then healed in every way (`ROWS`), each for so many minutes with everything (or, on a machine
that is not quiet, on so many `--tokens`), and the others by the default recipe. `--curve` gives it other
times. Losses are on texts that nothing else looks at, paired by window with the original's. Every finished row goes to
a scratch file beside the report; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

import layer_surgery
from layer_surgery.config.choices import DEFAULT_LOSSES, LOSS_CHOICES
from layer_surgery.errors import UserError
from layer_surgery.progress import Ui
from layer_surgery.records import PerplexityChange, SurgeryReport

#: How results are made that are healed or compared with. The default for a number of layers and the one for a number of
#: parameters, as many as the first has, are both as small as GRASP's.
SURGERIES: dict[str, dict[str, Any]] = {
    "default": {"keep": 0.2},
    "all layers": {"as_large_as": "default"},
    "remove": {"keep": 0},
    "grasp": {"keep": 0.2, "method": "grasp", "scorer": "block_influence"},
}
#: Ways of healing by name: the surgery before, and options.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "all layers, then default": ("all layers", {}),
    "removed, then default": ("remove", {}),
    **{f"loss {name}": ("default", {"loss": name}) for name in LOSS_CHOICES if (name,) != DEFAULT_LOSSES},
    "loss kl + 0.2 ce": ("default", {"loss": ["kl:1", "ce:0.2"]}),
    "loss kl + 0.1 hidden": ("default", {"loss": ["kl:1", "hidden:0.1"]}),
    "loss kl, temperature 2": ("default", {"loss": "kl:1:temperature=2"}),
    "lora, ce": ("default", {"train": "lora", "loss": "ce"}),
    "lora, kl": ("default", {"train": "lora"}),
    **{f"train {name}": ("default", {"train": name}) for name in ("factors", "operated", "last")},
    "local only": ("default", {"stages": ["local"]}),
    "local, squares, only": ("default", {"stages": ["local"], "local_error": "mse"}),
    "local, then global": ("default", {"stages": ["local", "global"]}),
    "no general text": ("default", {"general": 0.0}),
    **{f"learning rate {rate:g}": ("default", {"learning_rate": rate}) for rate in (1e-4, 3e-4, 1e-3)},
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--name", help="of the checkpoint in reports (default: the last part of its path)")
    parser.add_argument("--data", action="append", required=True, help="calibration and healing")
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=200, help="of each text")
    parser.add_argument("--target-layers", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, help="train every row on so many tokens, instead of minutes")
    parser.add_argument("--curve", type=float, nargs="*", default=[], help="other minutes for the default recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for the unhealed results (default: a temporary one)")
    parser.add_argument("--report", type=Path, help="default: reports/healing/NAME.json")
    return parser.parse_args()


class Rows:
    """Finished rows by seed and name, in a scratch file until all are there."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self._path, self._scratch, self._identity = path, path.with_suffix(".partial.jsonl"), identity
        found: list[dict[str, Any]] = []
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            self._check(earlier["identity"], path)
            found += earlier["rows"]
        if self._scratch.exists():
            first, *lines = self._scratch.read_text(encoding="utf-8").splitlines()
            self._check(json.loads(first), self._scratch)
            found += map(json.loads, lines)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._scratch.write_text(json.dumps(identity) + "\n", encoding="utf-8")
        self.known = {(row["seed"], row["row"], row["budget"]): row for row in found}

    def _check(self, identity: dict[str, Any], path: Path) -> None:
        if identity != self._identity:
            raise SystemExit(f"{path} is of other data or settings; delete it, or give another --report.")

    def add(self, row: dict[str, Any]) -> None:
        self.known[row["seed"], row["row"], row["budget"]] = row
        with self._scratch.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        print(row["seed"], row["row"], row["budget"], row.get("extra_loss", row.get("refused")), flush=True)

    def finish(self) -> None:
        rows = sorted(self.known.values(), key=lambda row: (row["seed"], row["budget"], row["row"]))
        write_report(self._path, {"identity": self._identity, "rows": rows})
        self._path.with_suffix(".md").write_text(page(self._identity, rows), encoding="utf-8")
        self._scratch.unlink()


def main() -> None:
    """Measure all rows."""
    arguments = options()
    torch.set_num_threads(arguments.threads)
    parts = [part for part in Path(arguments.model).resolve().parts if part != "checkpoint"]
    name = arguments.name or parts[-1]
    texts = [Path(text).name if os.path.exists(text) else text for text in arguments.eval_data]
    identity = {
        "checkpoint": name,
        "target_layers": arguments.target_layers,
        "data": [Path(text).name for text in arguments.data],
        "eval_data": texts,
        "eval_windows": arguments.eval_windows,
    }
    rows = Rows(arguments.report or ROOT / "reports" / "healing" / f"{name}.json", identity)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        for seed in arguments.seeds:
            budget = f"{arguments.tokens} tokens" if arguments.tokens else in_minutes(arguments, arguments.minutes)
            for row, own in [
                *((surgery, "") for surgery in SURGERIES),
                *((row, budget) for row in arguments.rows),
                *(("default", in_minutes(arguments, minutes)) for minutes in arguments.curve),
            ]:
                key = (seed, row if own else f"{row}, unhealed", own)
                if key not in rows.known:
                    try:
                        rows.add(measured(arguments, key, row, work))
                    except UserError as error:
                        rows.add({"seed": seed, "row": key[1], "budget": own, "refused": str(error)})
    rows.finish()


def in_minutes(arguments: argparse.Namespace, minutes: float) -> str:
    """Return the budget, which means something together with the threads only."""
    return f"{minutes:g} minutes on {arguments.threads} threads"


def measured(arguments: argparse.Namespace, key: tuple[int, str, str], row: str, work: Path) -> dict[str, Any]:
    """Return a row: of a surgery alone where it has no budget, else of a healing."""
    seed, name, budget = key
    common = {"eval_data": arguments.eval_data, "eval_windows": arguments.eval_windows, "continuations": 0}
    common |= {"seed": seed, "distance": False, "ui": Ui(note=print)}
    if not budget:
        report = surgery(arguments, row, work / f"{row}-{seed}", common)
        return {"seed": seed, "row": name, "budget": "", "extra_loss": extra(report.comparison.perplexity)}
    before, changes = ROWS[row]
    directory = work / f"{before}-{seed}"
    if not directory.exists():
        surgery(arguments, before, directory, common)
    report = layer_surgery.heal(
        directory,
        no_save=True,
        teacher=arguments.model,
        data=arguments.data,
        teacher_cache=work / "teacher" if arguments.tokens else None,  # in minutes, asking the original counts
        **({"tokens": arguments.tokens} if budget.endswith("tokens") else {"minutes": float(budget.split()[0])}),
        **common | changes,
    )
    healing, unhealed = report.healing, report.unhealed
    assert healing is not None and unhealed is not None
    return {
        "seed": seed,
        "row": name,
        "budget": budget,
        "extra_loss": extra(report.comparison.perplexity),
        "unhealed": extra(unhealed.comparison.perplexity),
        "gain": {Path(text).name: asdict(change.loss_difference) for text, change in unhealed.gain.perplexity.items()},
        "healing": without_folders(asdict(healing), arguments.data),
        "seconds": report.timings["heal"],
    }


def without_folders(record: dict[str, Any], files: list[str]) -> dict[str, Any]:
    """Return a record in which files have their names only: no report names a folder of a machine."""
    text = json.dumps(record)
    for file in files:
        text = text.replace(json.dumps(file)[1:-1], Path(file).name)
    found: dict[str, Any] = json.loads(text)
    return found


def surgery(arguments: argparse.Namespace, row: str, directory: Path, common: dict[str, Any]) -> SurgeryReport:
    """Make an unhealed result, and keep it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    options = {"target_layers": arguments.target_layers, **SURGERIES[row]}
    if "as_large_as" in options:
        other = directory.with_name(directory.name.replace(row, options["as_large_as"]))
        if not other.exists():
            surgery(arguments, options["as_large_as"], other, common)
        made = json.loads((other / "surgery.json").read_text(encoding="utf-8"))
        options = {"target_parameters": made["after"]["parameters"] / made["before"]["parameters"]}
    return layer_surgery.compress(
        arguments.model, directory, calibration=arguments.data, overwrite=True, **options, **common
    )


def extra(changes: dict[str, PerplexityChange]) -> dict[str, dict[str, Any]]:
    """Return the rise of the loss over the original's on each text."""
    return {Path(text).name: asdict(change.loss_difference) for text, change in changes.items()}


def page(identity: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table: means and ranges over seeds, and of the first text also as a share of GRASP's."""
    rows = [row for row in rows if "extra_loss" in row]
    texts = list(rows[0]["extra_loss"])
    by_name: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault((row["row"], row["budget"]), []).append(row)

    def values(found: list[dict[str, Any]], text: str) -> list[float]:
        return [row["extra_loss"][text]["value"] for row in found]

    def mean(found: list[dict[str, Any]], text: str) -> float:
        return sum(values(found, text)) / len(found)

    def cell(found: list[dict[str, Any]], text: str) -> str:
        least, most = min(values(found, text)), max(values(found, text))
        return f"{mean(found, text):+.4f}" + (f" [{least:+.4f}, {most:+.4f}]" if len(found) > 1 else "")

    grasp = by_name.get(("grasp, unhealed", ""))
    lines = [
        f"# Healing {identity['checkpoint']}, {identity['target_layers']} layers whole",
        "",
        "Extra loss over the original's, nats per token: means over seeds, [least, most]. Made by",
        "`experiments/healing/compare.py`.",
        "",
        "| way | budget | " + " | ".join(texts) + " | of GRASP's | tokens | seeds |",
        "|---|---:|" + "---:|" * (len(texts) + 3),
    ]
    for (name, budget), found in sorted(by_name.items(), key=lambda each: mean(each[1], texts[0])):
        share = f"{mean(found, texts[0]) / mean(grasp, texts[0]):.3f}" if grasp else ""
        tokens = sum(row.get("healing", {}).get("tokens", 0) for row in found) // len(found)
        cells = " | ".join(cell(found, text) for text in texts)
        lines.append(f"| {name} | {budget} | {cells} | {share} | {tokens:,} | {len(found)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
