"""Events of the file system in this process, in Python and in every library, and faults at one of them.

The counting is done in C (`filesystem_events.c`), which is compiled when it is first needed.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from layer_surgery.disk import renaming

_SOURCE = Path(__file__).with_suffix(".c")


def compiler() -> str | None:
    """Return a C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled counting; it counts nothing before `watch_events`."""
    command = compiler()
    assert command is not None, "a C compiler is needed to count events of the file system"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "events.so"
        subprocess.run([command, "-O1", "-shared", "-fPIC", "-o", made, _SOURCE, "-ldl"], check=True)
        return ctypes.CDLL(str(made), use_errno=True)


def prepare() -> None:
    """Change the tables of all libraries that are loaded; nothing is counted yet. A fork has it from this process."""
    assert library().watch(b"", -1, -1, 0, 0) > 50


def watch_events(folder: Path, log: int, at: int, signal: int = 0, error: int = 0) -> None:
    """Write down every event below a folder from now on, in this process, to an open file that is not below it.

    Args:
        log: its descriptor; an event is a line "event: WHAT PATH".
        at: at the event of this number, counted from 0, the signal comes or the event fails with the error, if one is
            given.
    """
    found = library().watch(str(folder).encode(), log, at, signal, error)
    assert found > 50, f"only {found} calls of the C library are watched"
    # It is looked up by name, which no table of addresses is asked for.
    rename = library().our_renameat2
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    renaming._function = lambda: rename  # type: ignore[assignment]
