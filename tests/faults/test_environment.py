"""A run with as little as there may be: no home to write to, few files, no network, another user, an ASCII locale.

All at once; `experiments/faults/environments.py` tries them one by one.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from environments import possible, start_in
from tiny_checkpoints import listing

import layer_surgery


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users can reach, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="ünder-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="unshare and setpriv are Linux's")
def test_a_run_needs_neither_home_nor_network_nor_many_files(model: Path, text: Path, folder: Path) -> None:
    shutil.copytree(model, folder / "model")
    shutil.copy(text, folder / "text.txt")
    arguments = ["compress", "model", "--layers", "1", "--keep", "0.3", "--calibration", "text.txt", "--eval-data"]
    arguments += ["text.txt", "--samples", "4", "--sequence-length", "16", "--output", "output", "--resume", "work"]
    start = start_in(possible(), arguments, folder)
    before = set(listing(folder))
    ended = start.run(folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr and "warning" not in ended.stderr.lower(), ended.stderr[-3000:]
    assert {name.split("/")[0] for name in set(listing(folder)) - before} == {"output"}  # nothing in the home either
    assert layer_surgery.load(folder / "output", verify=True).config.num_hidden_layers
