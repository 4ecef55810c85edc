"""Memory that layers leave behind when they go, and the hash of the code."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import layer_surgery
from layer_surgery.machine import code_sha256, provenance

# Blocks of several sizes below glibc's own limit of 32 MiB come and go; a small one stays after each.
# What is counted is what malloc holds: resident pages also go when the kernel is short of memory.
SCRIPT = """
import ctypes
import sys
import torch
from layer_surgery.machine import map_large_blocks, release_freed_memory

class Information(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks".split()]
    _fields_ += [("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Information

def held():
    return mallinfo2().arena + mallinfo2().hblkhd

if sys.argv[1] == "ours":
    map_large_blocks()
stay = []
torch.ones(31 << 20, dtype=torch.uint8)  # what raises glibc's limit
before = held()
for step in range(12):
    blocks = [torch.ones((5 + (step * k) % 7) << 20, dtype=torch.uint8) for k in range(1, 9)]
    stay.append(torch.ones(60_000, dtype=torch.uint8))
    del blocks
    if sys.argv[1] == "ours":
        release_freed_memory()
print(held() - before)
"""


def growth(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


has_mallinfo2 = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")


@has_mallinfo2
def test_freed_blocks_go_back_to_the_system() -> None:
    assert growth("ours") < 8 << 20


@has_mallinfo2
def test_without_it_they_would_pile_up() -> None:
    """The other test could not fail if this one did."""
    assert growth("plain") > 16 << 20


def test_the_hash_of_the_code_sees_every_byte_of_it_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(Path(layer_surgery.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__pycache__/api.cpython-311.pyc", "calibration_data/tasks/items.py", "notes.txt"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"x")
    whole = code_sha256()
    assert provenance(torch.device("cpu"))["code_sha256"] == whole == _hash_anew(copy)
    for name in ("api.py", "reporting/templates/card.md.jinja"):
        file = copy / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + b" ")
        assert _hash_anew(copy) != whole
        file.write_bytes(content)
    (copy / "api.py").rename(copy / "apis.py")
    assert _hash_anew(copy) != whole


def _hash_anew(root: Path) -> str:
    code_sha256.cache_clear()
    return code_sha256(root)
