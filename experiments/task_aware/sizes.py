"""Loss against parameters (and bytes): what each way of making a model smaller costs at the same size.

    python experiments/task_aware/sizes.py MODEL --seed 0 --calibration books.txt --eval-data held-out.txt

One run is one checkpoint and one calibration seed, and makes one JSON; sizes_page.py merges them. All ways see the same
calibration tokens and the same windows, and rises are paired by window with the original. `--methods` names the ways
(see ways.py): published methods that operate on a number of layers take the fewest that leave at most a fifth of each;
those that remove layers remove as many as the size asks for, so that they are smaller than it.

Every finished point goes to a scratch file beside the report (`*.partial.jsonl`), and a stopped run goes on; points of
a finished report are kept as well, if checkpoint, seed and data are the same, and measured again where `--tasks`
(choices between sentences, paired by item) or `--speed` (generation, in turns with the original) asks for more.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers.desk import Desk, Made
from points import Points, described, evaluate, one_thread, paired, points
from tasks import Item, Outcome, blimp_items, bundled_items, outcome
from ways import ALL, EQUAL_BYTES, MIX, MIX_8_BIT, QUANTISED, WAYS, Work, in_8_bits, original_in, size_of_equal_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.config import SpeedConfig
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.evaluation.speed import measure_speed
from layer_surgery.progress import no_progress

SPEED = SpeedConfig(speed=True, speed_lengths=(128,), speed_new_tokens=24, speed_repeats=5)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--name", help="of the checkpoint in reports (default: the last part of its path)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=32, help="of each text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.93, 0.88, 0.82, 0.76, 0.65, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(ALL), choices=ALL, metavar="WAY")
    parser.add_argument("--again", action="store_true", help="measure the points anew that a finished report has")
    parser.add_argument("--tasks", nargs="*", default=[], choices=ALL, metavar="WAY", help="ways to measure in tasks")
    parser.add_argument("--blimp", type=Path, help="folder of BLiMP, for tasks")
    parser.add_argument("--task-items", type=int, default=10, help="of each BLiMP paradigm and bundled task")
    parser.add_argument("--speed", nargs="*", default=[], choices=ALL, metavar="WAY", help="ways to time")
    parser.add_argument("--report", type=Path, help="default: reports/task_aware/sizes/NAME-seedN.json")
    return parser.parse_args()


class Report:
    """Rows by way and size: those of earlier runs, and new ones as they come."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path, self._head = path, head
        self._scratch = path.with_suffix(".partial.jsonl")
        self._identity = {key: head[key] for key in ("checkpoint_sha256", "seed", "data")}
        found: list[dict[str, Any]] = []
        self.new = set[tuple[str, Any]]()  # made since the report was finished
        if path.exists():
            earlier = json.loads(path.read_text(encoding="utf-8"))
            self._check({key: earlier.get(key) for key in self._identity}, path)
            found += earlier["rows"]
            if not head.get("original_tasks"):  # a later run without tasks keeps those of an earlier one
                self._head = head | {"original_tasks": earlier.get("original_tasks", {})}
        if self._scratch.exists():
            first, *lines = self._scratch.read_text(encoding="utf-8").splitlines()
            self._check(json.loads(first), self._scratch)
            made = [json.loads(line) for line in lines]
            self.new |= {(row["way"], row["asked"]) for row in made}
            found += made
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._scratch.write_text(json.dumps(self._identity) + "\n", encoding="utf-8")
        self.rows = {(row["way"], row["asked"]): row for row in found}

    def _check(self, identity: dict[str, Any], path: Path) -> None:
        if identity != self._identity:
            raise SystemExit(f"{path} is of another checkpoint, seed or data; delete it, or give another --report.")

    def known(self, *, again: bool) -> dict[tuple[str, Any], dict[str, Any]]:
        """Return the points that need not be measured."""
        return {key: row for key, row in self.rows.items() if not again or key in self.new}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a point."""
        self.rows[row["way"], row["asked"]] = row
        self.new.add((row["way"], row["asked"]))
        with self._scratch.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def finish(self) -> None:
        """Write the JSON; the scratch file goes."""
        write_report(self._path, {**self._head, "rows": list(self.rows.values())})
        self._scratch.unlink()


class Measuring:
    """Makes points of one model, and measures them."""

    def __init__(self, run: Points, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.work = Work(run, Desk(walk=run.bench.walk, new_scratch=run.session.new_scratch))
        self.items = task_items(arguments) if arguments.tasks else {}
        self.dense: dict[str, Outcome] = {
            name: outcome(run.session, run.session.checkpoint, items) for name, items in self.items.items()
        }

    def points(self, known: Any) -> Any:
        """Yield a row for every point that is wanted and not known."""
        wanted = self._arguments.methods
        for size in self._arguments.sizes:
            for name in WAYS:
                forms = [name] if name in wanted else []
                forms += [MIX_8_BIT] if name == MIX and MIX_8_BIT in wanted else []
                if any(not self._is_there(known, form, size) for form in forms):
                    yield from self._measure(name, forms, size, size)
        for name, bits in QUANTISED.items():
            if name in wanted and not self._is_there(known, name, 1.0):
                with self.work.own_scratch() as work:
                    yield self._row(work, name, 1.0, original_in(work, bits), 0.0)
        for name, (way, bits, as_bits) in EQUAL_BYTES.items():
            asked = f"bytes of {as_bits}-bit"
            if name in wanted and not self._is_there(known, name, asked):
                with self.work.own_scratch() as work:
                    size = size_of_equal_bytes(work, bits, as_bits)
                yield from self._measure(way, [name], size, asked, in_8=bits == 8)

    def _is_there(self, known: Any, name: str, asked: Any) -> bool:
        """Return whether a point is known, with tasks and speed if these are asked for."""
        row = known.get((name, asked))
        also = [key for key in ("tasks", "speed") if name in getattr(self._arguments, key)]
        return row is not None and ("unreachable" in row or all(key in row for key in also))

    def _measure(self, name: str, forms: list[str], size: float, asked: Any, in_8: bool = False) -> Any:
        with self.work.own_scratch() as work:
            start = time.process_time()
            try:
                made = WAYS[name](work, size)
            except (ValueError, LayerSurgeryError) as error:  # a size that this way cannot reach
                reason = " ".join(str(error).split())[:200]
                yield from ({"way": form, "asked": asked, "unreachable": reason} for form in forms)
                return
            seconds = time.process_time() - start
            for form in forms:
                eight = in_8 or form == MIX_8_BIT
                yield self._row(work, form, asked, in_8_bits(work, made) if eight else made, seconds)

    def _row(self, work: Work, name: str, asked: Any, made: Made, seconds: float) -> dict[str, Any]:
        run, whole = work.run, work.desk.checkpoint.parameters
        start = time.process_time()
        losses = evaluate(run.session, made.checkpoint, run.texts)
        row = {
            "way": name,
            "asked": asked,
            "size": round(made.parameters / whole, 5),
            "parameters": made.parameters,
            "bytes": made.bytes or 2 * made.parameters,
            "kept": made.kept,
            "predicted_loss_rise": made.predicted,
            "expected": made.expected,
            "extra_loss": {text: paired(losses[text], run.dense[text]) for text in losses},
            "cpu_seconds": {"surgery": round(seconds, 2), "evaluation": round(time.process_time() - start, 2)},
        }
        if name in self._arguments.tasks:
            row["tasks"] = {
                task: outcome(run.session, made.checkpoint, items).summary(self.dense[task])
                for task, items in self.items.items()
            }
        if name in self._arguments.speed and not made.padded:
            models = [run.session.stream(c).load_whole() for c in (run.session.checkpoint, made.checkpoint)]
            before, after = (points[0] for points in measure_speed(models, SPEED, no_progress, 0))
            row["speed"] = {"original": asdict(before), "result": asdict(after)}
        return row


def task_items(arguments: argparse.Namespace) -> dict[str, list[Item]]:
    """Return the items of the tasks: BLiMP if there is a folder, and the bundled ones that have a context."""
    each = arguments.task_items
    found = {}
    if arguments.blimp is not None:
        both = [blimp_items(arguments.blimp, odd=odd, each=each) for odd in (False, True)]
        found["BLiMP"] = [item for half in both for item in half]
    folder = ROOT / "calibration_data" / "tasks"
    items = [item for path in sorted(folder.glob("*.jsonl")) for item in bundled_items(path)[:each] if item[0]]
    return found | {"choices": items}


def main() -> None:
    """Measure all points of one checkpoint and seed."""
    arguments = options()
    one_thread()
    path = Path(arguments.model)
    parts = [part for part in path.resolve().parts if part != "checkpoint"]
    name = arguments.name or parts[-1]
    report = arguments.report or ROOT / "reports" / "task_aware" / "sizes" / f"{name}-seed{arguments.seed}.json"
    with points(
        arguments.model,
        arguments.calibration,
        arguments.eval_data,
        seed=arguments.seed,
        samples=arguments.samples,
        windows=arguments.eval_windows,
    ) as run:
        checkpoint = run.session.checkpoint
        measuring = Measuring(run, arguments)
        head = {
            "checkpoint": name,
            "checkpoint_sha256": checkpoint.sha256(),
            "parameters": checkpoint.parameters,
            "bytes": 2 * checkpoint.parameters,
            "layers": checkpoint.layer_count,
            "seed": arguments.seed,
            "data": {"calibration": described(run.tokens)} | {text.name: described(text) for text in run.texts},
            "original": {text: losses.mean for text, losses in run.dense.items()},
            "original_tasks": {task: found.summary(None) for task, found in measuring.dense.items()},
        }
        kept = Report(report, head)
        for row in measuring.points(kept.known(again=arguments.again)):
            kept.add(row)
            if "unreachable" in row:
                print(row["asked"], row["way"], "unreachable:", row["unreachable"], flush=True)
                continue
            rises = {text: round(value["rise"], 4) for text, value in row["extra_loss"].items()}
            print(row["asked"], row["way"], row["parameters"], row["bytes"], rises, row["cpu_seconds"], flush=True)
        kept.finish()


if __name__ == "__main__":
    main()
