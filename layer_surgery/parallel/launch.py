"""Joining the processes that a launcher has started, and what becomes of all of them when one fails.

A process that fails says so in the launcher's store and waits a moment, so that the first process, which watches the
store, can stop and say it. One that is killed says nothing: then connections to it break, and the launcher stops the
others. Either way the first process prints one sentence, the others nothing, and no scratch file stays.
"""

from __future__ import annotations

import _thread
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from layer_surgery.devices import backend
from layer_surgery.disk.signals import handled
from layer_surgery.errors import LayerSurgeryError, describe
from layer_surgery.parallel.group import Group, ProcessLost, gather, group, member

#: Seconds between two looks at the store, that a process may take to fail by itself when another has (so that all say
#: the same of an error that all make), and that one which failed waits for the first to have heard of it.
_LOOK, _GRACE, _PATIENCE = 0.2, 1.0, 5.0
#: A process may wait for the first for as long as its tasks take. That one has died is seen by other means.
_FOREVER = timedelta(days=30)
_FAILED, _HEARD = "layer-surgery/failed", "layer-surgery/heard"


def launched() -> bool:
    """Return whether a launcher has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1") and "RANK" in os.environ


class OtherFailed(LayerSurgeryError):
    """Another process has failed, and said why."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(f"{message} (in process {rank} of {group().world})")
        self.exit_code = exit_code


@contextmanager
def joined() -> Iterator[Group]:
    """Be one of the processes that the launcher has started, for the duration of the block; alone without a launcher.

    Raises `UserError` if there are not as many GPUs as processes on this machine, `OtherFailed` in the midst of the
    block if another process fails, and `ProcessLost` if one dies.
    """
    if not launched():
        yield group()
        return
    store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=10)))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    with member(Group(rank, world, local_rank, local_world)), _Watch(store, rank).watching():
        dist.init_process_group(
            backend(local_world),
            store=store,
            rank=rank,
            world_size=world,
            timeout=_FOREVER,
        )
        try:
            yield group()
            gather(None)  # no process ends, and breaks its connections, before all have done their work
        finally:
            with suppress(RuntimeError):
                dist.destroy_process_group()


class _Watch:
    """Tells the other processes that this one has failed, and this one that another has."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store, self._rank = store, rank
        self._failure: dict[str, Any] | None = None  # of another process
        self._stopping = False
        self._done = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look, args=(self._store.clone(),), daemon=True)
        # It stays after a failure: what is cleaned up and said then is not to be interrupted by the launcher.
        with handled(signal.SIGTERM, self._stop):
            thread.start()
            try:
                yield
            except BaseException as error:
                self._stopping = True
                raise self._failed(error) from error
            finally:
                self._done.set()
                thread.join()

    def _failed(self, error: BaseException) -> BaseException:
        """Tell the others of an error, unless it comes from one of them; return what it is to this process."""
        if isinstance(error, SystemExit) and not error.code:
            return error
        with suppress(RuntimeError):  # the store may be gone with the process that held it
            if isinstance(error, ProcessLost):
                # The connections of a process that fails may break a little before it says why.
                with suppress(RuntimeError):
                    self._store.wait([_FAILED], timedelta(seconds=2 * _GRACE))
                self._failure = self._failure or self._said()
            if self._failure is None and not isinstance(error, OtherFailed | ProcessLost):
                record = {"rank": self._rank, "message": _described(error), "exit_code": _exit_code(error)}
                self._store.compare_set(_FAILED, "", json.dumps(record))
            if self._rank == 0:
                self._store.set(_HEARD, "yes")
            else:
                self._store.wait([_HEARD], timedelta(seconds=_PATIENCE))
        if isinstance(error, ProcessLost) and self._failure is not None:
            return OtherFailed(**self._failure)
        return error

    def _look(self, store: Any) -> None:
        """Wait for another process to fail; then have the main thread stop, if it does not by itself."""
        while not self._done.wait(_LOOK):
            try:
                said = self._said(store)
            except RuntimeError:  # the store is gone, so the process that held it is
                return
            if said is not None and said["rank"] != self._rank:
                if not self._done.wait(_GRACE) and not self._stopping:
                    self._failure = said
                    _thread.interrupt_main(signal.SIGTERM)
                return

    def _said(self, store: Any = None) -> dict[str, Any] | None:
        store = store or self._store
        if not store.check([_FAILED]):
            return None
        found: dict[str, Any] = json.loads(store.get(_FAILED))
        return found

    def _stop(self, *_: object) -> None:
        """Stop the main thread, once: because another process failed, or because the launcher says so."""
        if self._stopping:
            return
        self._stopping = True
        if self._failure is None:
            with suppress(RuntimeError):
                said = self._said()
                self._failure = said if said is not None and said["rank"] != self._rank else None
        raise OtherFailed(**self._failure) if self._failure is not None else ProcessLost()


def _described(error: BaseException) -> str:
    """Return an error, or what has stopped a process, as one line."""
    if isinstance(error, Exception):
        return describe(error)
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    return code if isinstance(code, int) else 1
