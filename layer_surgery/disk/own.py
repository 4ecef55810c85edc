"""Directories that belong to one run: gone when it ends, and when it was killed, removed by a later one.

Each is locked by the process that made it. The system releases the lock when the process dies, so a directory of ours
that is not locked is what a dead run has left.
"""

import atexit
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layer_surgery.disk.locks import is_at, try_lock
from layer_surgery.disk.signals import signals_wait

#: Bytes of the random part of a name.
_RANDOM = 8
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Directories of this process: the descriptor that is locked, and the process, which a fork of it is not.
_own: dict[Path, tuple[int, int]] = {}


@contextmanager
def own_directory(parent: Path, prefix: str, *, mode: int = 0o700) -> Iterator[Path]:
    """Yield a new empty directory in `parent`, called `prefix` and random letters; what is there on exit is removed.

    Raises `OSError` if it cannot be made.
    """
    path = None
    try:
        with signals_wait():
            path = _make(parent, prefix, mode)
        yield path
    finally:
        with signals_wait():
            if path is not None:
                _remove(path)


def dead_directories(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield each directory that a run of this user which is dead has left in `parent`, locked while it is looked at.

    One that another process removes meanwhile, or whose file system has no locks, is passed over.
    """
    pattern = re.compile(re.escape(prefix) + rf"[0-9a-f]{{{2 * _RANDOM}}}")
    try:
        found = [parent / entry.name for entry in os.scandir(parent) if pattern.fullmatch(entry.name)]
    except OSError:
        return
    for path in sorted(found):
        try:
            descriptor = os.open(path, _OPEN)
        except OSError:
            continue
        try:
            own = os.fstat(descriptor).st_uid == os.geteuid()
            if own and try_lock(descriptor) and is_at(descriptor, path):
                yield path
        finally:
            os.close(descriptor)


def remove_dead(parent: Path, prefix: str) -> list[Path]:
    """Remove what dead runs have left in `parent`; return what was removed."""
    removed = []
    for path in dead_directories(parent, prefix):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            removed.append(path)
    return removed


def leave_behind(path: Path) -> None:
    """Keep an own directory after all: it is then one of a dead run, and the next run decides."""
    descriptor, _process = _own.pop(path, (-1, 0))
    if descriptor >= 0:
        os.close(descriptor)


def _make(parent: Path, prefix: str, mode: int) -> Path:
    while True:
        path = parent / f"{prefix}{secrets.token_hex(_RANDOM)}"
        path.mkdir(mode)  # fails if it exists: two processes never share one
        try:
            descriptor = os.open(path, _OPEN)
        except FileNotFoundError:
            continue
        if try_lock(descriptor) is not False and is_at(descriptor, path):
            _own[path] = (descriptor, os.getpid())
            return path
        os.close(descriptor)  # taken for a dead run's before it was locked


def _remove(path: Path) -> None:
    descriptor, process = _own.pop(path, (-1, 0))
    if process == os.getpid():
        # It may have been renamed to where it stays, and something else have its name; that is not ours.
        if is_at(descriptor, path):
            shutil.rmtree(path, ignore_errors=True)
            if is_at(descriptor, path):  # something could not be removed: tried again when the process ends
                _own[path] = (descriptor, process)
                return
        os.close(descriptor)


@atexit.register
def _remove_all() -> None:
    """Remove what a signal at the wrong moment has kept from being removed."""
    for path in list(_own):
        _remove(path)
