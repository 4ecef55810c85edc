"""Files written whole or not at all."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layer_surgery.disk.locks import is_at, try_lock
from layer_surgery.disk.own import own_directory
from layer_surgery.disk.renaming import rename_new, sync
from layer_surgery.disk.signals import signals_wait

#: Bytes of the random part of a name.
_RANDOM = 8


def write_atomically(path: Path, text: str, *, replace: bool = True) -> None:
    """Write a text file so that there is never half of it, whatever happens meanwhile, and have it on the disk.

    What a killed process has left of an earlier try is removed. Raises `FileExistsError` if the file exists and
    `replace` is not set, `OSError` if it cannot be written.
    """
    prefix = f".{path.name}.partial-"
    _remove_dead(path.parent, prefix)
    staging, descriptor = None, -1
    try:
        with signals_wait():
            staging, descriptor = _make(path.parent, prefix)
        with open(descriptor, "w", encoding="utf-8", newline="", closefd=False) as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)  # before it is renamed: a power cut must not leave an empty file there
        if replace:
            staging.replace(path)
        else:
            rename_new(staging, path)
        sync(path.parent)
    finally:
        with signals_wait():
            if staging is not None and descriptor >= 0:
                if is_at(descriptor, staging):
                    with suppress(OSError):
                        staging.unlink()
                os.close(descriptor)


@contextmanager
def staged_file(path: Path, prefix: str) -> Iterator[Path]:
    """Yield where a library may write a file, which gets its own name, replacing what has it, when the block succeeds.

    It is on the disk by then. What the library leaves beside it when it is killed stays in a directory of this process,
    called `prefix` and random letters, and goes with it; `remove_dead` (`own.py`) removes those of dead processes.

    Raises `OSError` if the directory or the file cannot be made.
    """
    with own_directory(path.parent, prefix) as folder:
        staging = folder / path.name
        yield staging
        sync(staging)
        staging.replace(path)
        sync(path.parent)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    """Return a new file and its descriptor, locked."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(_RANDOM)}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if try_lock(descriptor) is not False and is_at(descriptor, path):
            return path, descriptor
        os.close(descriptor)  # taken for a dead process's before it was locked


def _remove_dead(parent: Path, prefix: str) -> None:
    """Remove the files that processes which are dead were writing."""
    pattern = re.compile(re.escape(prefix) + rf"[0-9a-f]{{{2 * _RANDOM}}}")
    for name in sorted(name for name in os.listdir(parent) if pattern.fullmatch(name)):
        with suppress(OSError):
            descriptor = os.open(parent / name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if try_lock(descriptor):
                    (parent / name).unlink()
            finally:
                os.close(descriptor)
