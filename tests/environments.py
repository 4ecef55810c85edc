"""Environments that a run may find itself in: each is a change of a command, of its variables or of its limits."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

NOBODY = 65534


@dataclass
class Start:
    """How a process is started."""

    command: list[str]
    variables: dict[str, str]
    limits: list[tuple[int, int]] = field(default_factory=list)

    def run(self, folder: Path, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command,
            cwd=folder,
            env=self.variables,
            preexec_fn=lambda: [resource.setrlimit(which, (most, most)) for which, most in self.limits],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )


def read_only_home(start: Start, folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    home.chmod(0o555)
    start.variables["HOME"] = str(home)
    for name in ("HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "HF_MODULES_CACHE"):
        start.variables.pop(name, None)


def no_tmpdir(start: Start, folder: Path) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        start.variables.pop(name, None)


def few_files(start: Start, folder: Path) -> None:
    start.limits.append((resource.RLIMIT_NOFILE, 64))


def plain_ascii(start: Start, folder: Path) -> None:
    start.variables |= {"LANG": "C", "LC_ALL": "C"}


def no_network(start: Start, folder: Path) -> None:
    start.command[:0] = ["unshare", "-n"]


def other_user(start: Start, folder: Path) -> None:
    """As nobody, who owns the folder; what is there must be readable to all."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    at = 2 if start.command[0] == "unshare" else 0  # only root may unshare
    start.command[at:at] = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


ENVIRONMENTS: dict[str, Callable[[Start, Path], None]] = {
    "read-only HOME": read_only_home,
    "no TMPDIR": no_tmpdir,
    "ulimit -n 64": few_files,
    "LANG=C": plain_ascii,
    "no network": no_network,
    "another user": other_user,
}


def possible() -> list[str]:
    """Return the environments that this process can make."""
    root = os.geteuid() == 0
    alone = root and shutil.which("unshare") is not None and _works(["unshare", "-n", "true"])
    other = root and shutil.which("setpriv") is not None
    impossible = {*([] if alone else ["no network"]), *([] if other else ["another user"])}
    return [name for name in ENVIRONMENTS if name not in impossible]


def start_in(names: Collection[str], arguments: list[str], folder: Path) -> Start:
    """Return how to start `layer-surgery` in all of these environments, in a folder of its own."""
    start = Start([sys.executable, "-m", "layer_surgery", *arguments], dict(os.environ))
    for name in ENVIRONMENTS:
        if name in names:
            ENVIRONMENTS[name](start, folder)
    return start


def _works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
