"""Two runs at the same time on one output, sweep, cache or `--resume` directory, begun a random moment apart.

    python experiments/faults/races.py [--count 200] [--output reports/faults/races.json]

A run that ends with 0 has its result somewhere, whole: under the name that it was given, or under the one that it says.
One that is refused says so in a sentence. Nothing else is left.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from fault_injection import contents, leave_out_what_takes_long, place_for_faults, run, warm
from outcomes import FINE, LOST, RAW, REFUSED, WRONG, Outcome, options, try_all
from tiny_checkpoints import saved_model, text_file


class Races:
    """Pairs of commands, each with what it gives alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model, text = str(saved_model(folder / "model")), str(text_file(folder / "text.txt"))
        warm(folder / "model", folder / "text.txt")
        data = ["--calibration", text, "--samples", "4", "--sequence-length", "16"]
        removal = ["--keep", "0", "--no-refit", "--no-eval", "--output", "output"]
        one, other = (["compress", model, "--layers", layer, *removal] for layer in "12")
        resumed = ["compress", model, "--layers", "1", "--keep", "0.3", "--method", "fisher", *data, "--no-eval"]
        resumed += ["--refit-general", "0"]
        sweep = ["sweep", model, "--method", "remove", "--scorer", "last", *data, "--eval-data", text]
        sweep += ["--eval-windows", "2", "--continuations", "0", "--output", "output"]
        score = ["score", model, *data, "--cache", "output"]
        self.pairs = {
            "fresh": (one, other),
            "overwrite": ([*one, "--overwrite"], [*other, "--overwrite"]),
            "fresh and overwrite": (one, [*other, "--overwrite"]),
            "sweep": ([*sweep, "--target-layers", "3"], [*sweep, "--target-layers", "2"]),
            "cache": (score, score),
            "resume": tuple([*resumed, "--output", name, "--resume", "work"] for name in ("output", "output2")),
        }
        self.alone = {kind: [self._alone(command) for command in pair] for kind, pair in self.pairs.items()}

    def kinds(self) -> dict[str, Callable[[int], Outcome]]:
        return {kind: lambda number, kind=kind: self.race(kind, number) for kind in self.pairs}  # type: ignore[misc]

    def race(self, kind: str, number: int) -> Outcome:
        draw, place = random.Random(f"{kind} {number}"), self._new("race")
        pauses = [0.0, draw.choice((0.0, 0.01, 0.05, 0.2)) * draw.random()]
        draw.shuffle(pauses)
        children, logs = list[int](), list[Path]()
        for side, command in enumerate(self.pairs[kind]):
            log = self.folder / f"{place.name}-{side}"
            logs.append(log)
            child = os.fork()
            if child == 0:
                time.sleep(pauses[side])
                ended = run(command, place, watch=lambda _log: leave_out_what_takes_long(), log=log)
                os._exit(100 if ended.code is None else ended.code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        said = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
        found = contents(place)
        shutil.rmtree(place)
        return self._judged(kind, codes, said, found)

    def _judged(self, kind: str, codes: list[int], said: list[str], found: dict[str, str]) -> Outcome:
        both = f"{codes}\n" + "\n--\n".join(said) + f"\n{sorted(found)}"
        if any("Traceback" in each for each in said) or not set(codes) <= {0, 1, 2}:
            return RAW, both
        folders: dict[str, dict[str, str]] = {}
        for name, digest in found.items():
            folder, _, rest = name.partition("/")
            if folder != "tmp":
                folders.setdefault(folder, {})[rest] = digest
        if any(folder.startswith(".") or "/." in name for folder, files in folders.items() for name in ("", *files)):
            return RAW, f"something is left\n{both}"
        if kind in ("sweep", "cache"):
            return (FINE if 0 in codes else RAW), both
        given = [each for code, each in zip(codes, self.alone[kind], strict=True) if code == 0]
        replaced = kind != "fresh" and len(given) == 2  # the later one has taken the place of the earlier, as told
        there = list(folders.values())
        if any(each not in self.alone[kind] for each in there):
            return WRONG, both
        lost = [each for each in given if each not in there]
        if lost and not (replaced and len(lost) == 1 and kind != "resume"):
            return LOST, both
        return (FINE if codes == [0, 0] else REFUSED), ""

    def _alone(self, command: list[str]) -> dict[str, str]:
        place = self._new("alone")
        ended = run(command, place, watch=lambda _log: leave_out_what_takes_long())
        assert ended.code == 0, ended.said
        name = command[command.index("--output") + 1] if "--output" in command else "output"
        return contents(place / name)

    def _new(self, name: str) -> Path:
        place = self.folder / f"{name}-{os.getpid()}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place


def main() -> None:
    given = options(__doc__, 200).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=place_for_faults()) as name:
        try_all("two runs at the same time", Races(Path(name)).kinds(), given, at_once=10)


if __name__ == "__main__":
    main()
