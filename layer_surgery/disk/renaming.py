"""Renaming that never replaces what it should not, and exchanging two names at once.

Linux has both in one call, renameat2 (https://man7.org/linux/man-pages/man2/rename.2.html); where the system or the
file system has not, `rename_new` takes a way round that is as safe, and `exchange` says so.
"""

import ctypes
import errno
import functools
import os
import sys
from pathlib import Path
from typing import Any

_AT_FDCWD = -100  # fcntl.h
_NOREPLACE, _EXCHANGE = 1, 2  # linux/fs.h
#: What renameat2 fails with where the kernel or the file system does not know it or the flag.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or directory to a name that must not exist. Raises `FileExistsError` if it does, and `OSError`."""
    if _renameat2(source, target, _NOREPLACE):
        return
    if source.is_dir():
        target.mkdir()  # claims the name, or fails; a rename replaces an empty directory, and no other
        try:
            source.rename(target)
        except OSError:
            target.rmdir()
            raise
    else:
        os.link(source, target)
        source.unlink()


def exchange(one: Path, other: Path) -> bool:
    """Exchange what two names that exist stand for, at once; False if that cannot be done here. Raises `OSError`."""
    return _renameat2(one, other, _EXCHANGE)


def sync_tree(directory: Path) -> None:
    """Have all that is below a directory, and its names, on the disk before this returns. Raises `OSError`."""
    for folder, _folders, files in os.walk(directory, topdown=False):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before this returns. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing for directories
            raise
    finally:
        os.close(descriptor)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Rename with a flag; False where that is not known. Raises `OSError` for what goes wrong otherwise."""
    function = _function()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@functools.cache
def _function() -> Any:
    """Return the C library's renameat2, or None."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # an older C library
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function
