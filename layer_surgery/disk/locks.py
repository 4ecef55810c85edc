"""Locks between processes that the system releases when the process dies, however it does (flock)."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layer_surgery.disk.signals import signals_wait

#: What flock fails with where the file system has no locks (some that are on a network).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF)


class LockedError(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file or directory (which need not exist) on a file beside it, gone again on exit.

    Where the file system has no locks, nothing is held. Raises `LockedError` if it is held already, `OSError` if the
    file cannot be made.
    """
    lock = lock_file(path)
    descriptor = -1
    try:
        with signals_wait():
            descriptor = _take(lock)
        yield
    finally:
        if descriptor >= 0:
            with signals_wait():
                with suppress(OSError):
                    lock.unlink()  # while it is held: so nobody else can have taken it
                os.close(descriptor)


def lock_file(path: Path) -> Path:
    """Return the file that the lock of `path` is on."""
    return path.with_name(f".{path.name}.lock")


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or directory and return True; False if another has it, None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether a path still leads to what is open as `descriptor`."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def _take(lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if try_lock(descriptor) is False:
                raise LockedError
            if is_at(descriptor, lock):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever had it has removed the file between our opening and our locking it
