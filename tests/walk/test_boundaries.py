"""The boundary store: memory and disk give the same, and nothing is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layer_surgery.errors import LayerSurgeryError
from layer_surgery.walk.boundaries import BoundaryStore

SHAPE = (5, 3, 4)
SLOT_BYTES = 5 * 3 * 4 * 4


def store(scratch: Path, memory_bytes: int, dtype: torch.dtype = torch.float32) -> BoundaryStore:
    return BoundaryStore(SHAPE, dtype, torch.device("cpu"), memory_bytes, scratch)


def states(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def on_disk(of: BoundaryStore) -> list[int]:
    return sorted(of._on_disk)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_bytes", [0, 1 << 20], ids=["disk", "memory"])
def test_reads_what_was_written_bit_for_bit(tmp_path: Path, memory_bytes: int, dtype: torch.dtype) -> None:
    written = states(0, dtype)
    with store(tmp_path, memory_bytes, dtype) as boundaries:
        for rows in (slice(3, 5), slice(0, 3)):
            boundaries.write(7, rows, written[rows])
        for rows in (slice(0, 5), slice(1, 4), slice(4, 5)):
            assert torch.equal(boundaries.read(7, rows), written[rows])
            assert boundaries.read(7, rows).dtype == dtype


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20], ids=["disk", "memory"])
def test_rows_can_be_overwritten_without_touching_others(tmp_path: Path, memory_bytes: int) -> None:
    expected = states(0)
    with store(tmp_path, memory_bytes) as boundaries:
        boundaries.write(0, slice(0, 5), expected)
        boundaries.write(0, slice(2, 3), states(1)[2:3])
        expected[2] = states(1)[2]
        assert torch.equal(boundaries.read(0, slice(0, 5)), expected)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20], ids=["disk", "memory"])
def test_a_strided_view_is_stored_rightly(tmp_path: Path, memory_bytes: int) -> None:
    transposed = torch.randn(3, 5, 4).transpose(0, 1)
    with store(tmp_path, memory_bytes) as boundaries:
        boundaries.write(0, slice(0, 5), transposed)
        assert torch.equal(boundaries.read(0, slice(0, 5)), transposed)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20], ids=["disk", "memory"])
def test_writing_keeps_no_graph(tmp_path: Path, memory_bytes: int) -> None:
    with store(tmp_path, memory_bytes) as boundaries:
        boundaries.write(0, slice(0, 5), states(0).requires_grad_())
        assert not boundaries.read(0, slice(0, 5)).requires_grad


def test_slots_go_to_memory_while_they_fit_and_then_to_disk(tmp_path: Path) -> None:
    with store(tmp_path, 3 * SLOT_BYTES - 1) as boundaries:
        for slot in range(4):
            boundaries.write(slot, slice(0, 5), states(slot))
        assert on_disk(boundaries) == [2, 3]
        for slot in range(4):
            assert torch.equal(boundaries.read(slot, slice(0, 5)), states(slot))


def test_dropping_a_slot_makes_room_in_memory(tmp_path: Path) -> None:
    with store(tmp_path, SLOT_BYTES) as boundaries:
        boundaries.write(0, slice(0, 5), states(0))
        boundaries.drop(0)
        assert 0 not in boundaries
        boundaries.write(1, slice(0, 5), states(1))
        assert 1 in boundaries
        assert on_disk(boundaries) == []


def test_dropping_a_slot_on_disk_closes_its_file(tmp_path: Path) -> None:
    before = open_files()
    with store(tmp_path, 0) as boundaries:
        boundaries.write(0, slice(0, 5), states(0))
        assert open_files() == before + 1
        boundaries.drop(0)
        assert open_files() == before
        assert 0 not in boundaries


@pytest.mark.parametrize(
    ("call", "done"), [("tempfile.mkstemp", "written"), ("os.pwrite", "written"), ("os.preadv", "read")]
)
def test_a_full_or_broken_disk_is_said_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, done: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def use(boundaries: BoundaryStore) -> None:
        boundaries.write(0, slice(0, 5), states(0))
        boundaries.read(0, slice(0, 5))

    monkeypatch.setattr(call, fail)
    message = rf"cannot be {done} in {tmp_path} \(No space left on device\)"
    with store(tmp_path, 0) as boundaries, pytest.raises(LayerSurgeryError, match=message):
        use(boundaries)
    assert list(tmp_path.iterdir()) == []


def test_dropping_what_is_not_there_does_nothing(tmp_path: Path) -> None:
    with store(tmp_path, 0) as boundaries:
        boundaries.drop(3)
        assert 3 not in boundaries


def test_scratch_files_have_no_name_even_while_in_use(tmp_path: Path) -> None:
    with store(tmp_path, 0) as boundaries:
        boundaries.write(0, slice(0, 5), states(0))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("raises", [False, True])
def test_all_slots_are_freed_on_exit(tmp_path: Path, raises: bool) -> None:
    before = open_files()
    boundaries = store(tmp_path, SLOT_BYTES)
    try:
        with boundaries:
            for slot in range(3):
                boundaries.write(slot, slice(0, 5), states(slot))
            if raises:
                raise RuntimeError("on purpose")
    except RuntimeError:
        assert raises
    assert open_files() == before
    assert not any(slot in boundaries for slot in range(3))
    assert list(tmp_path.iterdir()) == []


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    boundaries = store(tmp_path, 0)
    boundaries.write(0, slice(0, 5), states(0))
    boundaries.close()
    boundaries.close()
    assert 0 not in boundaries
