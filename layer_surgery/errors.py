"""The errors that Layer Surgery raises on purpose.

Every message is one sentence that names the argument, what was found, what is allowed and what to do.
A `UserError` is a mistake in what was asked for (exit code 2); any other `LayerSurgeryError` is a failure
of the work itself (exit code 1).
"""

import difflib
import errno
from collections.abc import Iterable


class LayerSurgeryError(Exception):
    """Base of all errors raised on purpose; the command line prints its message without a traceback."""

    exit_code = 1


class UserError(LayerSurgeryError, ValueError):
    """A request that cannot be carried out as it was made."""

    exit_code = 2


class CheckpointError(UserError):
    """The checkpoint is missing, damaged, of an unsafe format or of an unsupported architecture."""


class DataError(UserError):
    """The calibration or evaluation data cannot be used."""


class PlanError(UserError):
    """The plan, the budget or the choice of layers cannot be carried out on this model."""


class OutputError(UserError):
    """The output directory cannot be used."""


class ReportError(UserError):
    """A file to report on that is no report, is damaged, or is of a newer release."""


class NumericalError(LayerSurgeryError):
    """A value that must be finite is not."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name nearest to `name`, or `""` if none is near."""
    lowered = {each.lower(): each for each in known}
    matches = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f" Did you mean '{lowered[matches[0]]}'?" if matches else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown `name` of a `kind` of thing, with the nearest and all `known` names."""
    names = sorted(known)
    return f"unknown {kind} '{name}'.{nearest_name(name, names)} Known: {', '.join(names)}."


#: Errors of a file system that are about the name or the rights that somebody has given.
_MISTAKES = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    errno.ELOOP,
}


def exit_code(error: Exception) -> int:
    """Return the exit code for an error: 2 for a mistake in what was asked for, 1 for a failure."""
    if isinstance(error, LayerSurgeryError):
        return error.exit_code
    return 2 if isinstance(error, OSError) and error.filename and error.errno in _MISTAKES else 1


def describe(error: Exception) -> str:
    """Return an exception as one line for people."""
    text = " ".join(str(error).split())
    if isinstance(error, LayerSurgeryError):
        return text
    if isinstance(error, OSError) and error.strerror and error.filename:
        hint = "; check the path, and what you may do there" if exit_code(error) == 2 else ""
        return f"{error.filename}: {error.strerror}{hint}"
    if "out of memory" in text.lower():
        return f"out of memory ({text[:200]}); try a smaller --batch-size or --sequence-length"
    return f"{type(error).__name__}: {text[:500]}"
