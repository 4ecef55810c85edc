"""The directory in which a run keeps what it has finished: of one run only, locked, and gone when the run is done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from layer_surgery import parallel
from layer_surgery.disk.locks import LockedError, locked
from layer_surgery.disk.reading import read_json, why
from layer_surgery.disk.writing import write_atomically
from layer_surgery.errors import OutputError
from layer_surgery.journal.steps import NO_STEPS, Steps

_RUN_FILE, _STAGES = "run.json", "stages"
#: Of the run's file, what a run that was killed while it wrote that has left.
_HALF_WRITTEN = f".{_RUN_FILE}.partial-"


class Journal:
    """What one run has finished, a folder a stage. Without a directory nothing is kept."""

    def __init__(self, directory: Path | None, note: Callable[[str], object] = lambda _text: None) -> None:
        self._directory, self._note = directory, note
        self._stages: dict[Path, Steps] = {}

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Say which run it is, by all that decides what it gives; go on with the same one that was stopped.

        Raises `OutputError` that names what differs if the directory has another run's work.
        """
        directory = self._directory
        if directory is not None:
            parallel.from_first(lambda: self._begin(directory, json.loads(json.dumps(dict(identity)))))

    def stage(self, name: str, *inputs: Any) -> Steps:
        """Return the finished steps of a stage; `inputs` (JSON) are what else decides what it gives."""
        if self._directory is None:
            return NO_STEPS
        key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
        folder = self._directory / _STAGES / f"{name}-{key}"
        if folder not in self._stages:
            self._stages[folder] = steps = Steps(folder, self._note)
            if len(steps):
                self._note(f"{name}: {len(steps)} finished steps are in {self._directory}; going on from there")
        return self._stages[folder]

    def _begin(self, directory: Path, identity: dict[str, Any]) -> None:
        try:
            directory.mkdir(exist_ok=True)
            for left in directory.glob(f"{_HALF_WRITTEN}*"):
                left.unlink()
            if (directory / _RUN_FILE).exists():
                _check_same(directory, _known(directory), identity)
            else:
                write_atomically(directory / _RUN_FILE, json.dumps(identity, indent=1) + "\n")
            (directory / _STAGES).mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"--resume {directory} cannot be written ({why(error)}); give another one.") from error


#: Of runs that keep nothing.
NOTHING_KEPT = Journal(None)


@contextmanager
def open_journal(directory: Path | None, note: Callable[[str], object]) -> Iterator[Journal]:
    """Yield the journal of a run in a directory, locked; once the run is done it is removed, else it stays.

    Raises `OutputError` for a directory that holds something else, that another run works in, or that cannot be made.
    """
    if directory is None:
        yield NOTHING_KEPT
        return
    with ExitStack() as stack:
        parallel.from_first(lambda: _lock(directory, stack))
        yield Journal(directory, note)
        parallel.barrier()
        if parallel.is_first():
            try:
                shutil.rmtree(directory / _STAGES, ignore_errors=True)
                (directory / _RUN_FILE).unlink(missing_ok=True)
                if not any(directory.iterdir()):
                    directory.rmdir()
            except OSError as error:  # the run is done, and its result is there
                note(f"warning: --resume {directory} is not needed any more and cannot be removed ({why(error)})")


def check_journal(directory: Path | None, output: Path | None) -> None:
    """Raise `OutputError` unless a directory is free for a journal, or has one."""
    if directory is None:
        return
    try:
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"--resume {directory} is no directory; give another one.")
        names = os.listdir(directory) if directory.exists() else []
        found = {name for name in names if not name.startswith(_HALF_WRITTEN)}
    except OSError as error:
        raise OutputError(f"--resume {directory} cannot be read ({why(error)}); give another one.") from error
    if found and _RUN_FILE not in found and found != {_STAGES}:
        raise OutputError(f"--resume {directory} holds other files ('{min(found)}'); give an empty or a new directory.")
    if output is not None:
        inner, outer = directory.resolve(), output.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise OutputError(f"--resume {directory} and --output {output} are in one another; give another directory.")


def _lock(directory: Path, stack: ExitStack) -> None:
    try:
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(directory.absolute()))
    except LockedError:
        raise OutputError(f"--resume {directory} is in use by another run; wait for it, or give another one.") from None
    except OSError as error:
        raise OutputError(f"--resume {directory} cannot be written ({why(error)}); give another one.") from error


def _known(directory: Path) -> dict[str, Any]:
    try:
        known = read_json(directory / _RUN_FILE)
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise OutputError(f"--resume {directory} is damaged ({_RUN_FILE} is not what a run writes); delete it.")
    return known


def _check_same(directory: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    if different:
        raise OutputError(
            f"--resume {directory} holds the finished layers of another run ("
            + "; ".join(f"{name} was {_short(was.get(name))} and is {_short(now.get(name))}" for name in different[:3])
            + "); give the same settings to go on with it, or another directory, or delete it."
        )


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
