"""Finished steps of one stage of a run: what each has found and written, found again by name.

A step is in a folder from the moment that its mark, a JSON file with the hashes of its other files, has its name there;
files that no mark lists are what a killed run was writing, and are removed. What a step finds depends on the step and
on what the stage was begun with only, so a step that is found again need not be done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from layer_surgery import parallel
from layer_surgery.disk.reading import check_regular, read_json, why
from layer_surgery.disk.writing import write_atomically
from layer_surgery.errors import LayerSurgeryError

Write = Callable[[Path], object]
"""Writes one file."""

_PASSING = "passing"
#: Bytes of JSON in a mark at most: the spectra of all linears of a very wide layer with many experts take less.
_MARK_BYTES = 1 << 32


@dataclass(frozen=True)
class Finished:
    """A step that is finished."""

    record: Any  #: The JSON that it was finished with.
    kept: Path  #: The file that this process kept of it, if it kept one.
    passing: Path  #: The same of what only the step after it needs: it is there for the last finished step only.


class Steps:
    """The finished steps of a stage; all processes see the same. Without a folder nothing is kept or found."""

    def __init__(self, folder: Path | None, note: Callable[[str], object] = lambda _text: None) -> None:
        """Open a folder, which the first process makes if it is not there; what is damaged in it is not used."""
        self._folder, self._note = folder, note
        self._numbers: dict[str, int] = {}
        self._listed: set[str] = set()  # in the first process: the files of finished steps
        self._working = folder is not None
        if folder is not None:
            found = parallel.from_first(lambda: self._opened(folder))
            if found is None:
                self._folder, self._working = None, False
            else:
                self._numbers = found

    def __len__(self) -> int:
        return len(self._numbers)

    def folder(self, name: str) -> Path | None:
        """Return a folder for files that steps write; None if nothing is kept."""
        if self._folder is None:
            return None
        folder = self._folder / name
        failed = parallel.from_first(lambda: _made(folder))
        if not failed:
            return folder
        if self._numbers:  # whose files are there
            raise LayerSurgeryError(
                f"{folder} cannot be made ({failed}); make room, and give the same command to go on with what is "
                "finished."
            )
        self._note(f"warning: finished layers are not kept in {self._folder} ({failed})")
        self._folder, self._working = None, False
        return None

    def find(self, name: str) -> Finished | None:
        """Return a step, if it is finished."""
        if name not in self._numbers:
            return None
        assert self._folder is not None
        number, rank = self._numbers[name], parallel.group().rank
        mark = read_json(self._mark(number), _MARK_BYTES)
        return Finished(mark["step"]["record"], *(self._file(kind, number, rank) for kind in ("kept", _PASSING)))

    def leading(self, names: Iterable[str]) -> list[Finished]:
        """Return the first of some steps, as many in a row as are finished."""
        found = []
        for name in names:
            step = self.find(name)
            if step is None:
                break
            found.append(step)
        return found

    def finish(self, name: str, record: Any = None, *, kept: Write | None = None, passing: Write | None = None) -> None:
        """Keep a step: its record, the files that were written to folders of the stage, and two files more.

        Every process writes these; `passing` is removed when the next step that has such a file is finished. If
        something cannot be written, the user is told, and nothing is kept from then on: the run itself goes on.
        """
        if not self._working or self._folder is None or name in self._numbers:
            return
        number, failed = len(self._numbers), ""
        try:
            for kind, write in (("kept", kept), (_PASSING, passing)):
                if write is not None:
                    write(self._file(kind, number, parallel.group().rank))
        except OSError as error:
            failed = why(error)
        except SafetensorError as error:
            failed = str(error)
        failed = next(filter(None, parallel.gather(failed)), "")  # and all that others have written is there
        failed = failed or parallel.from_first(lambda: self._marked(number, name, record))
        if failed:
            self._note(f"warning: finished layers are not kept any more in {self._folder.parent} ({failed})")
            self._working = False
            return
        self._numbers[name] = number
        if passing is not None:
            parallel.from_first(lambda: self._remove_passing(before=number))

    def _mark(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number:06d}.json"

    def _file(self, kind: str, number: int, rank: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{kind}-{number:06d}-{rank:05d}"

    def _marked(self, number: int, name: str, record: Any) -> str:
        """Write the mark of a step; return why it cannot be."""
        try:
            files = {path: _sha256(self._absolute(path)) for path in sorted(self._files() - self._listed)}
            step = {"name": name, "record": record, "files": files}
            write_atomically(self._mark(number), json.dumps({"sha256": _of_json(step), "step": step}, allow_nan=False))
        except OSError as error:
            return why(error)
        self._listed |= files.keys()
        return ""

    def _files(self) -> set[str]:
        """Return the files of the stage but for marks, by their paths in its folder."""
        assert self._folder is not None
        found = (path for path in self._folder.rglob("*") if not path.is_dir())
        names = {path.relative_to(self._folder).as_posix() for path in found}
        return {name for name in names if "/" in name or not name.endswith(".json")}

    def _absolute(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / name

    def _remove_passing(self, before: int) -> None:
        assert self._folder is not None
        for path in self._folder.glob(f"{_PASSING}-*"):
            if int(path.name.split("-")[1]) < before:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):  # no mark lists it any more: the next run removes it
                        path.unlink()

    def _opened(self, folder: Path) -> dict[str, int] | None:
        """Return the numbers of the steps in a folder, by name, every byte of them checked; None if nothing can be kept
        there."""
        if failed := _made(folder):
            self._note(f"warning: finished layers are not kept in {folder} ({failed})")
            return None
        try:
            numbers, damaged = self._checked(), False
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._note(f"warning: the finished layers in {folder} are not used ({error}); doing them again")
            numbers, damaged, self._listed = {}, True, set()
        try:
            if damaged:
                shutil.rmtree(folder)
                folder.mkdir()
            for name in self._files() - self._listed:
                self._absolute(name).unlink()
        except OSError as error:
            raise LayerSurgeryError(
                f"{folder} holds what a run that was stopped has left, which cannot be removed ({why(error)}); remove "
                "it, or give another --resume."
            ) from error
        return numbers

    def _checked(self) -> dict[str, int]:
        assert self._folder is not None
        numbers: dict[str, int] = {}
        files: dict[str, str] = {}
        for number, path in enumerate(sorted(self._folder.glob("[0-9]*.json"))):
            mark = read_json(path, _MARK_BYTES)
            step = mark["step"]
            if path != self._mark(number) or mark["sha256"] != _of_json(step):
                raise ValueError(f"{path.name} is damaged")
            numbers[step["name"]] = number
            if any(name.startswith(f"{_PASSING}-") for name in step["files"]):
                files = {name: sha256 for name, sha256 in files.items() if not name.startswith(f"{_PASSING}-")}
            files |= step["files"]
        for name, sha256 in files.items():
            if _sha256(self._absolute(name)) != sha256:
                raise ValueError(f"{name} is damaged")
        self._listed = set(files)
        return numbers


#: Steps that are neither kept nor found.
NO_STEPS = Steps(None)


def _made(folder: Path) -> str:
    """Make a folder, unless it is there; return why it cannot be made."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        return why(error)
    return ""


def _of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _sha256(path: Path) -> str:
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
