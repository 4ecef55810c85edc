"""What signals do to a run: those that would end it have it clean up first, and end with one line."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

from layer_surgery.disk.signals import ignore_signals, set_handlers

INTERRUPTED = "interrupted; nothing half-written is left."
#: Seconds after which a signal comes again whose exception has had nobody to go to.
_AGAIN = 0.05
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
    if sys.unraisablehook is not _stop_again:
        global _ignored_otherwise
        _ignored_otherwise, sys.unraisablehook = sys.unraisablehook, _stop_again


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


#: What was to be done with exceptions that cannot be raised, which is done with all but those of signals.
_ignored_otherwise = sys.unraisablehook


def _stop_again(ignored: Any) -> None:
    """Send a signal again that came in a callback of the interpreter's own, such as a finalizer: it drops whatever is
    raised there, so that the run would go on."""
    if _raised and isinstance(ignored.exc_value, KeyboardInterrupt | Stopped):
        again = threading.Timer(_AGAIN, os.kill, (os.getpid(), _raised))
        again.daemon = True
        again.start()
    else:
        _ignored_otherwise(ignored)


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
