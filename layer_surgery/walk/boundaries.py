"""Hidden states at the boundaries between layers, kept outside the model: in memory while small, else on disk."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from layer_surgery.disk.reading import why
from layer_surgery.errors import LayerSurgeryError


class BoundaryStore:
    """Numbered slots, each [sequences, sequence_length, hidden] of one dtype.

    The first slots live on `device` while they fit in `memory_bytes`; the others in one unlinked scratch file each,
    read and written with plain file calls. (A memory map would count as resident memory once touched.)
    Use as a context manager; everything is gone on exit, also after a crash.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, memory_bytes: int, scratch: Path
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._memory_left, self._scratch = memory_bytes, scratch
        self._in_memory: dict[int, Tensor] = {}
        self._on_disk: dict[int, int] = {}  # slot -> file descriptor

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.shape[0] * self.sequence_bytes

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence in a slot."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    def __contains__(self, slot: int) -> bool:
        return slot in self._in_memory or slot in self._on_disk

    def read(self, slot: int, rows: slice) -> Tensor:
        """Return [rows, sequence_length, hidden] on the device. Do not write to it.

        Raises `LayerSurgeryError` if it cannot be read.
        """
        if slot in self._in_memory:
            return self._in_memory[slot][rows]
        buffer = torch.empty((rows.stop - rows.start, *self.shape[1:]), dtype=self.dtype)
        view = _bytes(buffer)
        offset = rows.start * self.sequence_bytes
        while len(view):
            with self._scratch_file("read"):
                count = os.preadv(self._on_disk[slot], [view], offset)
            if count == 0:
                raise LayerSurgeryError("the scratch file of the layer boundaries was cut short.")
            view, offset = view[count:], offset + count
        return buffer.to(self.device)

    def read_ahead(self, slot: int, rows: slice) -> None:
        """Say which rows of a slot are read next: the system fetches them from the disk meanwhile, if they are there.

        It keeps them in its own cache, which is no memory of this process.
        """
        if slot in self._on_disk and hasattr(os, "posix_fadvise"):  # not on every system
            offset, length = rows.start * self.sequence_bytes, (rows.stop - rows.start) * self.sequence_bytes
            with suppress(OSError):
                os.posix_fadvise(self._on_disk[slot], offset, length, os.POSIX_FADV_WILLNEED)

    def write(self, slot: int, rows: slice, hidden: Tensor) -> None:
        """Store [rows, sequence_length, hidden]; the slot is made on its first write.

        Raises `LayerSurgeryError` if the scratch file cannot be written.
        """
        if slot not in self:
            self._make(slot)
        hidden = hidden.detach()
        if slot in self._in_memory:
            self._in_memory[slot][rows] = hidden
            return
        view = _bytes(hidden.to("cpu", self.dtype).contiguous())
        offset = rows.start * self.sequence_bytes
        while len(view):
            with self._scratch_file("written"):
                count = os.pwrite(self._on_disk[slot], view, offset)
            view, offset = view[count:], offset + count

    def drop(self, slot: int) -> None:
        """Free a slot; dropping one that does not exist does nothing."""
        if slot in self._in_memory:
            del self._in_memory[slot]
            self._memory_left += self.slot_bytes
        elif slot in self._on_disk:
            os.close(self._on_disk.pop(slot))

    def exchange(self, slot: int, other: int) -> None:
        """Let two slots that exist change places."""
        places: tuple[dict[int, Any], ...] = (self._in_memory, self._on_disk)
        for place in places:
            held = {number: place.pop(number) for number in (slot, other) if number in place}
            place |= {slot + other - number: value for number, value in held.items()}

    def close(self) -> None:
        """Free all slots."""
        for slot in [*self._in_memory, *self._on_disk]:
            self.drop(slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self, slot: int) -> None:
        if self.slot_bytes <= self._memory_left:
            self._memory_left -= self.slot_bytes
            self._in_memory[slot] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            return
        with self._scratch_file("written"):
            descriptor, path = tempfile.mkstemp(prefix="layer-surgery-boundary-", dir=self._scratch)
            self._on_disk[slot] = descriptor
            os.unlink(path)  # the file lives until it is closed, and no longer

    @contextmanager
    def _scratch_file(self, done: str) -> Iterator[None]:
        """Say of errors of the file system what cannot be done, and what to do."""
        try:
            yield
        except OSError as error:
            raise LayerSurgeryError(
                f"the hidden states between layers cannot be {done} in {self._scratch} ({why(error)}); make room "
                f"there, or give fewer --samples: those before one layer take {self.slot_bytes:,} bytes."
            ) from error


@dataclass(frozen=True)
class Boundary:
    """The hidden states [sequences, sequence_length, hidden] in one slot of a store."""

    store: BoundaryStore
    slot: int

    def read(self, rows: slice) -> Tensor:
        """Return [rows, sequence_length, hidden] on the device. Do not write to it."""
        return self.store.read(self.slot, rows)

    def read_ahead(self, rows: slice) -> None:
        """Say which rows are read next."""
        self.store.read_ahead(self.slot, rows)

    def write(self, rows: slice, hidden: Tensor) -> None:
        """Store [rows, sequence_length, hidden]."""
        self.store.write(self.slot, rows, hidden)

    def save(self, path: Path) -> None:
        """Write the bytes of all hidden states to a file, one sequence at a time. Raises `OSError`."""
        with path.open("wb") as file:
            for row in range(self.store.shape[0]):
                file.write(_bytes(self.read(slice(row, row + 1)).to("cpu").contiguous()))

    def load(self, path: Path) -> None:
        """Store what `save` has written. Raises `LayerSurgeryError` if it is of other hidden states."""
        if path.stat().st_size != self.store.slot_bytes:
            raise LayerSurgeryError(f"{path} has other hidden states than these.")
        with path.open("rb") as file:
            for row in range(self.store.shape[0]):
                buffer = torch.empty((1, *self.store.shape[1:]), dtype=self.store.dtype)
                file.readinto(_bytes(buffer))
                self.write(slice(row, row + 1), buffer.to(self.store.device))


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, shared."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")
