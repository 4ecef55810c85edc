"""Signals that would end the process, made to wait while something must not be left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: A terminal's Ctrl-C, a polite kill, and a terminal that is closed.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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


def ignore_signals() -> None:
    """Ignore the signals of `ENDING` from now on: the process is about to end by itself."""
    set_handlers(signal.SIG_IGN)


def set_handlers(handler: Any) -> None:
    """Have `handler` called for the signals of `ENDING`, but for those that the process was started to ignore."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
