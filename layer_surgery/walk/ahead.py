"""The next layer's tensors, read by one background thread while this layer computes.

At most one layer is read ahead. What fails in the thread is raised where the layer is asked for, as if it were read
there; what nobody asks for is dropped. The bytes are the same: the thread does what the walk would do itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from layer_surgery.devices import moves_beside

Tensors = dict[str, Tensor]


class ReadAhead:
    """Reads one numbered thing ahead, on `device`."""

    def __init__(self, read: Callable[[int], Tensors], device: torch.device) -> None:
        self._read, self._device = read, device
        self._thread: ThreadPoolExecutor | None = None  # made on its first use
        self._coming: tuple[int, Future[tuple[Tensors, torch.cuda.Event | None]]] | None = None

    def begin(self, number: int) -> None:
        """Begin to read, unless it is being read already; what was read ahead and not taken is dropped first."""
        if self._coming is not None:
            if self._coming[0] == number:
                return
            self.drop()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._coming = number, self._thread.submit(self._work, number)

    def take(self, number: int) -> Tensors | None:
        """Return what was read ahead, waiting for it; None if it was something else, which is dropped."""
        if self._coming is None:
            return None
        if self._coming[0] != number:
            self.drop()
            return None
        (_, future), self._coming = self._coming, None
        tensors, moved = future.result()
        if moved is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(moved)
            for tensor in tensors.values():
                tensor.record_stream(stream)
        return tensors

    def drop(self) -> None:
        """Forget what is being read ahead, when it has been read: two reads at a time would take more memory."""
        if self._coming is None:
            return
        (_, future), self._coming = self._coming, None
        if not future.cancel():
            future.exception()

    def _work(self, number: int) -> tuple[Tensors, torch.cuda.Event | None]:
        if not moves_beside(self._device):
            return self._read(number), None
        beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.stream(beside):
            tensors, moved = self._read(number), torch.cuda.Event()  # type: ignore[no-untyped-call]
            moved.record()
            return tensors, moved
