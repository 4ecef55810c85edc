"""Signals that would end the process, made to wait while something must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: A terminal's Ctrl-C, a polite kill, and a terminal that is closed.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Signals that have a handler of their own for the time being.
_handled: set[int] = set()


@contextmanager
def signals_wait() -> Iterator[None]:
    """Hold back the signals of `ENDING` until the block is done; the first that came is then delivered.

    By handlers and not by a mask, which other threads of the process would not share. In a thread that is not the main
    one, which no handler ever runs in, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    # Ignored ones stay ignored (nohup does that), and those that were not set from Python stay as they are.
    handlers = {number: signal.getsignal(number) for number in ENDING}
    held = {number: found for number, found in handlers.items() if found not in (signal.SIG_IGN, None)}
    try:
        for number in held:
            signal.signal(number, lambda number, _frame: came.append(number))
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def handled(number: int, handler: Any) -> Iterator[None]:
    """Have `handler` called for a signal, whatever `set_handlers` is asked for meanwhile.

    After an exception it stays until `set_handlers` is called: what cleans up is to be stopped no second time.
    """
    before = signal.signal(number, handler)
    _handled.add(number)
    try:
        yield
        signal.signal(number, before)
    finally:
        _handled.discard(number)


def ignore_signals() -> None:
    """Ignore the signals of `ENDING` from now on: the process is about to end by itself."""
    set_handlers(signal.SIG_IGN)


def set_handlers(handler: Any) -> None:
    """Have `handler` called for the signals of `ENDING`, but for those that the process was started to ignore.

    And for those that have a handler of their own; see `handled`.
    """
    for number in ENDING:
        if number not in _handled and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
