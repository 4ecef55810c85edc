"""Runs that are killed while they are at a step (a layer of statistics, surgery or refit) and go on with `--resume`."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fault_injection import Watch, contents, leave_out_what_takes_long, run

from layer_surgery.journal.steps import Steps

_DATA = ["--samples", "6", "--sequence-length", "16", "--batch-size", "4", "--refit-general", "0", "--no-eval"]
#: By name, what is done to a tiny Llama with four layers.
COMMANDS: dict[str, list[str]] = {
    "mix": ["--target-parameters", "0.8"],
    "mix of all kinds": ["--target-parameters", "0.7", "--components", "channels,singular,heads,bypass"],
    "fisher": ["--layers", "1,2", "--keep", "0.3", "--method", "fisher", "--refit-scope", "operated"],
    "cache": ["--target-layers", "3", "--keep", "0.3", "--method", "fisher", "--cache", "cache"],
    "svd": ["--layers", "0,2", "--keep", "0.3", "--method", "svd", "--refit"],
    "svd_llm": ["--layers", "1,2", "--keep", "0.3", "--method", "svd_llm"],
    "grasp": ["--layers", "1,2", "--keep", "0.3", "--method", "grasp", "--refit"],
    "grasp_sequential": ["--layers", "1,2", "--keep", "0.3", "--method", "grasp_sequential"],
    "laco": ["--layers", "1,3", "--keep", "0", "--method", "laco", "--refit"],
    "replaceme": ["--target-layers", "3", "--keep", "0", "--method", "replaceme", "--scorer", "taylor"],
    "parts": ["--target-layers", "3", "--keep", "0", "--remove", "mlp"],
}


@dataclass(frozen=True)
class Run:
    """A command, the steps that it finishes when nothing stops it, and what it gives."""

    command: list[str]
    folder: Path
    steps: list[str]
    result: dict[str, str]

    @classmethod
    def begin(cls, name: str, model: Path, text: Path, folder: Path) -> Run:
        """Run a command of `COMMANDS` without a stop."""
        folder.mkdir()
        command = ["compress", str(model), *COMMANDS[name], "--calibration", str(text), *_DATA, "--output", "output"]
        ended = run([*command, "--resume", "work"], folder, watch=stopped_at(None))
        assert ended.code == 0, ended.said
        assert sorted(path.name for path in folder.iterdir() if path.name != "cache") == ["output", "tmp"]
        without = run([*command, "--overwrite"], folder, watch=stopped_at(None))
        assert without.code == 0 and not without.events, without.said
        return cls(command, folder, ended.events, contents(folder / "output"))

    def problems(self, at: int, again: int | None = None) -> Iterator[str]:
        """Yield what does not hold if the run is killed when it is about to finish a step (counted from 0), and the
        next one, if `again` is given, so many steps later."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        finished = list[str]()
        for stop in (at, again, None):
            ended = run([*self.command, "--resume", "work"], self.folder, watch=stopped_at(stop))
            finished += ended.events
            if stop is None or ended.code == 0:
                break
            if ended.code is not None:
                yield f"killed at {stop}: it ends with {ended.code}\n{ended.said}"
        where = f"killed at {at} and {again} ({self.steps[at]})"
        if ended.code != 0:
            yield f"{where}: the next run ends with {ended.code}\n{ended.said}"
        elif contents(self.folder / "output") != self.result:
            yield f"{where}: the result has other bytes"
        if sorted(finished) != sorted(self.steps):
            yield f"{where}: steps done twice or left out: {_difference(finished, self.steps)}"
        if left := [path.name for path in self.folder.iterdir() if path.name not in ("output", "tmp", "cache")]:
            yield f"{where}: left {left}"


def stopped_at(number: int | None) -> Watch:
    """Return what writes down every step that is finished, and kills the process before this one is (counted from 0):
    all its work is done, and lost."""

    def watch(log: int) -> None:
        leave_out_what_takes_long()
        marked, seen = Steps._marked, [0]

        def noted(self: Steps, *arguments: Any) -> str:
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            said = marked(self, *arguments)
            os.write(log, f"event: {self._folder and self._folder.name} {arguments[1]}\n".encode())
            return said

        Steps._marked = noted  # type: ignore[method-assign]

    return watch


def _difference(found: list[str], wanted: list[str]) -> list[str]:
    return sorted({step for step in [*found, *wanted] if found.count(step) != wanted.count(step)})
