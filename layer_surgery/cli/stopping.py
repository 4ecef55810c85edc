"""What signals do to a run: those that would end it have it clean up first, and end with one line."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from layer_surgery.disk.signals import ignore_signals, set_handlers

INTERRUPTED = "interrupted; nothing half-written is left."
#: The signal that has been raised as an exception.
_raised = 0


class Stopped(SystemExit):
    """A signal other than Ctrl-C has asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def stop_at_once() -> None:
    """Have signals end the process on the spot, while modules are imported and nothing is there to clean up.

    An exception would not do: some libraries swallow whatever is raised while they are imported.
    """
    global _raised
    _raised = 0
    set_handlers(_exit)


def stop_by_cleaning_up() -> None:
    """Have signals raise `KeyboardInterrupt` or `Stopped` from now on, so that a run cleans up."""
    set_handlers(_raise)


def raise_again() -> None:
    """Raise what a signal has raised, if one came: compiled code may have made another error of that, as matplotlib's
    does in the middle of a figure."""
    if _raised:
        _raise(_raised, None)


def end(number: int) -> NoReturn:
    """End the process as one that a signal has stopped; further signals change nothing any more."""
    ignore_signals()
    _say()
    sys.exit(128 + number)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    _say()
    os._exit(128 + number)


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    global _raised
    _raised = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Stopped(number)


def _say() -> None:
    try:
        sys.stderr.write(f"{INTERRUPTED}\n")
        sys.stderr.flush()
    except (OSError, RuntimeError, ValueError):  # a terminal that has gone; a signal in the middle of writing
        pass
