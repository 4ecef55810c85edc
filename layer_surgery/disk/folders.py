"""Folders in which a run keeps things for others, given by the user and made when they are first needed."""

import os
from pathlib import Path

from layer_surgery.disk.reading import why
from layer_surgery.errors import UserError


def check_folder(folder: Path | None, option: str) -> None:
    """Raise `UserError`, which names the option, if a folder is neither a directory nor can be made; None is none.

    One that is read-only may be of use.
    """
    if folder is None:
        return
    try:
        if folder.is_dir():
            return
        nearest = next(place for place in folder.absolute().parents if place.exists())
        possible = not os.path.lexists(folder) and nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
        reason = "is no directory and cannot be made one"
    except OSError as error:
        possible, reason = False, f"cannot be a directory ({why(error)})"
    if not possible:
        raise UserError(f"{option} {folder} {reason}; give another directory.")
