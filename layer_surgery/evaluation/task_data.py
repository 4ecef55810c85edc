"""Data of tasks, from the local caches or else from the hub, and what task libraries do to the whole process."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import datasets
import huggingface_hub
import numpy as np
import torch

from layer_surgery.errors import DataError

_HUB: Any = huggingface_hub.constants
_HUB_TIMEOUT_SECONDS = 5
T = TypeVar("T")


def from_cache_or_hub(load: Callable[[], T], refused: Callable[[Exception], DataError]) -> T:
    """Return what `load` gives: without a network if it can be had so, else from the hub.

    With HF_HUB_OFFLINE set, or where the hub does not answer, there is no network. `refused` makes the error.
    """
    try:
        # Only from the cache of the hub's libraries: what is here needs no network.
        with changed(_HUB, "HF_HUB_OFFLINE", True), changed(datasets.config, "HF_HUB_OFFLINE", True):
            return load()
    except Exception as error:  # the configuration can name any loader, and run any code of its author's
        # The libraries would try an unreachable hub for half a minute a task.
        # A ValueError is what `datasets` raises of a subset that is not in the cache, where another one is.
        if _HUB.HF_HUB_OFFLINE or not isinstance(error, OSError | ValueError) or not _hub_answers():
            raise refused(error) from error
    try:
        return load()
    except Exception as error:
        raise refused(error) from error


def cannot_be_loaded(name: str, error: Exception, instead: str) -> DataError:
    """Return the error for a task that could not be loaded; `instead` is what else can be done without a network."""
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, ConnectionError):
        return DataError(
            f"the data of task '{name}' are neither in the local cache nor can they be had from the hub ({reason}); "
            f"run where there is a network, or {instead}."
        )
    return DataError(f"task '{name}' cannot be loaded ({type(error).__name__}: {reason}).")


@contextlib.contextmanager
def changed(library: Any, name: str, value: Any) -> Iterator[None]:
    """Have an attribute of a library's module otherwise for the duration of the block."""
    was = getattr(library, name)
    setattr(library, name, value)
    try:
        yield
    finally:
        setattr(library, name, was)


def _hub_answers() -> bool:
    try:
        huggingface_hub.get_session().head(_HUB.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception:  # of whichever HTTP library the hub's client uses
        return False
    return True


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Have Python's, numpy's and torch's global generators as they were, behind the block."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
