"""Memory that layers leave behind when they go."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Blocks of several sizes below glibc's own limit of 32 MiB come and go; a small one stays after each.
SCRIPT = """
import sys
import torch
from layer_surgery.machine import map_large_blocks, release_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "ours":
    map_large_blocks()
stay = []
torch.ones(31 << 20, dtype=torch.uint8)  # what raises glibc's limit
before = resident()
for step in range(12):
    blocks = [torch.ones((5 + (step * k) % 7) << 20, dtype=torch.uint8) for k in range(1, 9)]
    stay.append(torch.ones(60_000, dtype=torch.uint8))
    del blocks
    if sys.argv[1] == "ours":
        release_freed_memory()
print(resident() - before)
"""


def growth(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_blocks_go_back_to_the_system() -> None:
    assert growth("ours") < 8 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_without_it_they_would_pile_up() -> None:
    """The other test could not fail if this one did."""
    assert growth("plain") > 16 << 20
