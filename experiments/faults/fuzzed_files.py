"""Plans, reports, sweeps, caches, journals and data files that are changed at random, read by what reads them.

    python experiments/faults/fuzzed_files.py [--count 2000] [--output reports/faults/fuzzed_files.json]

Each is read, or refused with a sentence. A cache or a journal that was changed is never used: that would be silently
wrong. Figures of pages are laid out but not drawn, which takes nine tenths of a page's time.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from fault_injection import leave_out_what_takes_long, place_for_faults
from fault_injection import run as in_fork
from matplotlib.figure import Figure
from mutations import mutated_bytes, mutated_json, mutated_lines
from outcomes import FINE, REFUSED, WRONG, Outcome, options, try_all
from resuming import stopped_at
from tiny_checkpoints import saved_model, text_file

import layer_surgery
from layer_surgery.calibration import cache as statistics_cache
from layer_surgery.calibration.statistics import Statistics
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.config import CalibrationConfig, CompressConfig, RuntimeConfig
from layer_surgery.journal import Steps
from layer_surgery.runs.planning import Planning, checked
from layer_surgery.runs.session import open_session
from layer_surgery.walk.walk import Walk

TOKENS: dict[str, Any] = {"samples": 4, "sequence_length": 16}
CHATS = [
    {"messages": [{"role": "user", "content": f"the quick {n}"}, {"role": "assistant", "content": "brown fox"}]}
    for n in range(40)
]
ROWS = [{"prompt": f"one two {n}", "answer": "three four", "text": "the lazy dog", "label": n % 2} for n in range(40)]


class Files:
    """What is fuzzed, made once, and how each kind is read."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.model, self.text = saved_model(folder / "model"), text_file(folder / "text.txt")
        calibration: dict[str, Any] = {**TOKENS, "calibration": self.text, "cache": folder / "cache"}
        measured: dict[str, Any] = {**calibration, "eval_data": self.text, "eval_windows": 2}
        self.result, self.sweep = folder / "result", folder / "sweep"
        layer_surgery.compress(self.model, target_layers=3, keep=0.3, output=self.result, refit_general=0, **measured)
        layer_surgery.sweep(
            self.model, target_layers=[3, 2], method=["remove"], scorer=["last"], output=self.sweep, **measured
        )
        arguments = ["compress", str(self.model), "--layers", "1", "--keep", "0.3", "--no-eval", "--output", "output"]
        arguments += ["--calibration", str(self.text), "--samples", "4", "--sequence-length", "16"]
        (folder / "run").mkdir()
        in_fork([*arguments, "--refit-general", "0", "--resume", "work"], folder / "run", watch=stopped_at(12))
        (self.steps,) = (folder / "run" / "work" / "stages").glob("statistics-*")
        self.session = stack.enter_context(open_session(self.model, RuntimeConfig()))
        streamed = self.session.stream(self.session.checkpoint)
        tokens = self.session.calibration_tokens(CalibrationConfig(**TOKENS, calibration=[str(self.text)]))
        self.walk = stack.enter_context(Walk(streamed, tokens, self.session.settings))
        self.known = self._cached()
        assert self.known is not None
        self.data = self._data()

    def kinds(self) -> dict[str, Callable[[int], Outcome | None]]:
        data = {f"data: {name}": self._reading(name) for name in self.data}
        return {
            "plan": self.plan,
            "report": self.report,
            "sweep": self.swept,
            "cache": self.cache,
            "journal": self.journal,
            **data,
        }

    def plan(self, number: int) -> None:
        draw, file = random.Random(f"plan {number}"), self.folder / "plan.json"
        plan = json.dumps(json.loads((self.result / "surgery.json").read_text())["plan"]).encode()
        file.write_bytes(mutated_json(plan, draw))
        config = checked(CompressConfig(plan=file, no_save=True, eval_data=None))
        planning = Planning(config, self.session.checkpoint, self.session.device)
        planning.plan(None, "")

    def report(self, number: int) -> None:
        self._page(self.result, "surgery.json", random.Random(f"report {number}"))

    def swept(self, number: int) -> None:
        self._page(self.sweep, "sweep.json", random.Random(f"sweep {number}"))

    def _page(self, made: Path, name: str, draw: random.Random) -> None:
        folder = self.folder / f"page-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / name).write_bytes(mutated_json((made / name).read_bytes(), draw))
        page, _notes = layer_surgery.report(folder)
        text = page.read_text(encoding="utf-8")
        assert "<script>alert(1)" not in text, "what stands in a record runs in its page"

    def cache(self, number: int) -> Outcome:
        """Change one file of the cache, in its JSON with a hash that is right one time in four."""
        draw = random.Random(f"cache {number}")
        (made,) = (self.folder / "cache").iterdir()
        file = draw.choice(sorted(made.iterdir()))
        if draw.random() < 0.4:
            file = made / statistics_cache.RECORD_FILE
        return self._changed(file, draw, self._cached, self.known)

    def journal(self, number: int) -> Outcome:
        draw = random.Random(f"journal {number}")
        file = draw.choice(sorted(path for path in self.steps.rglob("*") if path.is_file()))
        whole = self.folder / "whole-steps"
        if not whole.exists():
            shutil.copytree(self.steps, whole)

        def read() -> Any:
            steps = Steps(self.steps)
            return [steps.find(str(index)).record for index in (3, 2, 1, 0)[: len(steps)]] or None  # type: ignore[union-attr]

        known = read()
        try:
            return self._changed(file, draw, read, known)
        finally:
            shutil.rmtree(self.steps)
            shutil.copytree(whole, self.steps)

    def _changed(self, file: Path, draw: random.Random, read: Callable[[], Any], known: Any) -> Outcome:
        before = file.read_bytes()
        after = (
            mutated_json(before, draw)
            if file.suffix == ".json" and draw.random() < 0.7
            else mutated_bytes(before, draw)
        )
        file.unlink()  # not written to in place: others may have it open
        file.write_bytes(after)
        try:
            found = read()
        finally:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(before)
        if found is None:
            return REFUSED, "not used"
        return (FINE, "") if found == known else (WRONG, f"{file.name} was changed, and is used")

    def _cached(self) -> Any:
        """Return what the cache gives, or None if it computes again."""

        class Again(Exception):
            pass

        def again(*_: object, **__: object) -> None:
            raise Again

        collect, statistics_cache.collect = statistics_cache.collect, again  # type: ignore[assignment]
        try:
            cache = statistics_cache.StatisticsCache(self.folder / "cache", "", lambda _note: None, maps=False)
            found = cache.get(self.walk, self.folder, self.session.checkpoint.dtype, "layer")
        except Again:
            return None
        finally:
            statistics_cache.collect = collect
        return None if found is None else _content(found)

    def _data(self) -> dict[str, tuple[bytes, Callable[[bytes, random.Random], bytes]]]:
        import pandas

        lines = {"text": ROWS, "chat": CHATS}
        found = {
            f"{name}.jsonl": ("\n".join(map(json.dumps, rows)).encode(), mutated_lines) for name, rows in lines.items()
        }
        found |= {f"{name}.json": (json.dumps(rows).encode(), mutated_json) for name, rows in lines.items()}
        table = pandas.DataFrame(ROWS)
        table.to_parquet(self.folder / "rows.parquet")
        return {
            **found,
            "rows.csv": (table.to_csv(index=False).encode(), mutated_bytes),
            "rows.parquet": ((self.folder / "rows.parquet").read_bytes(), mutated_bytes),
            "plain.txt": (self.text.read_bytes(), mutated_bytes),
        }

    def _reading(self, name: str) -> Callable[[int], None]:
        content, mutate = self.data[name]

        def read(number: int) -> None:
            folder = self.folder / f"data-{os.getpid()}"
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(mutate(content, random.Random(f"{name} {number}")))
            self.session.calibration_tokens(
                CalibrationConfig(samples=4, sequence_length=40, calibration=[str(folder / name)])
            )

        return read


def _content(statistics: Statistics) -> Any:
    tensors = {
        f"{index} {name}": tensor.tolist()
        for index in statistics.ranks
        for name, tensor in FactorStore.read(statistics.components, index).items()
    }
    parts = ("sizes", "values", "ranks", "channels", "heads", "experts", "maps", "couplings", "loss_scale")
    return [getattr(statistics, name) for name in parts], tensors


def draw_nothing() -> None:
    """Have figures written as the first one of this process is drawn; what is laid out in them is not drawn."""
    savefig, drawn = Figure.savefig, list[str]()

    def written(self: Figure, file: Any, **how: Any) -> None:
        if not drawn:
            before = file.tell()
            savefig(self, file, **how)
            file.seek(before)
            drawn.append(file.read())
        else:
            file.write(drawn[0])

    Figure.savefig = written  # type: ignore[method-assign]


def main() -> None:
    given = options(__doc__, 2000).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=place_for_faults()) as name, ExitStack() as stack:
        leave_out_what_takes_long()
        files = Files(Path(name), stack)
        draw_nothing()
        layer_surgery.report(files.result)
        try_all("files changed at random", files.kinds(), given)


if __name__ == "__main__":
    main()
