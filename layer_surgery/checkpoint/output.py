"""The directory of a result: made beside its destination, checked, and renamed into place at once.

While a run works, everything of it is in one hidden directory beside the output, and a lock on the output keeps others
away. What a run that was killed has left is found and put right by the next one.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from transformers import PreTrainedModel

from layer_surgery.checkpoint.contents import not_ours, remove_result
from layer_surgery.disk.locks import LockedError, locked
from layer_surgery.disk.own import dead_directories, leave_behind, own_directory
from layer_surgery.disk.reading import why
from layer_surgery.disk.renaming import exchange, rename_new, sync, sync_tree
from layer_surgery.disk.signals import signals_wait
from layer_surgery.errors import LayerSurgeryError, OutputError

Note = Callable[[str], None]
#: In the hidden directory of a run: the result, and an old one where names cannot be exchanged.
_NEW, _OLD = "result", "old"


def _silent(_text: str) -> None:
    pass


@contextmanager
def staged_directory(output: Path, *, overwrite: bool, note: Note = _silent) -> Iterator[Path]:
    """Yield an empty directory that becomes `output` if the block succeeds; its parent is for what is not kept.

    If it does not, also on Ctrl-C, all is removed and `output` is as it was. If something that may not be replaced has
    come to `output` meanwhile, the result is kept under a name near it.

    Raises `OutputError` if `output` exists and `overwrite` is not set, if it holds what is not ours, if another run
    works on it, or if it cannot be written; `LayerSurgeryError` if writing fails.
    """
    check_output(output, overwrite=overwrite)
    with ExitStack() as stack:
        with refusing(output):
            stack.enter_context(new_folders(output.parent))
            stack.enter_context(output_lock(output))
            _put_right(output, note)
            check_output(output, overwrite=overwrite)
            work = stack.enter_context(own_directory(output.parent, _prefix(output)))
            staging = work / _NEW
            staging.mkdir()
        yield staging
        with writing(output):
            sync_tree(staging)
            with signals_wait():
                _put_in_place(staging, output, overwrite=overwrite, note=note)
                sync(output.parent)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` if `output` exists and may not be replaced, or if its name cannot be."""
    with refusing(output):
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise OutputError(f"--output {output} is a file or a link; give the name of a directory.")
        if not output.exists():
            return
        if not overwrite:
            raise OutputError(
                f"--output {output} exists already; choose another name, or pass --overwrite to replace it."
            )
        if output in (Path.cwd(), *Path.cwd().parents):
            raise OutputError(f"--output {output} is the current directory or above it; give a directory of its own.")
        if not os.access(output, os.R_OK | os.W_OK | os.X_OK):
            raise OutputError(f"--output {output} may not be changed by you; choose another name.")
        problem = not_ours(output)
    if problem is not None:
        raise OutputError(
            f"--output {output} {problem}, so it is not a result of Layer Surgery alone and is not replaced, even with "
            "--overwrite; choose another name."
        )


def check_not_same(model: str | Path | PreTrainedModel, output: Path) -> None:
    """Raise `OutputError` if writing `output` would replace the model that is read."""
    if isinstance(model, PreTrainedModel):
        return
    with suppress(OSError):  # what cannot be looked at is refused by who opens it
        if not (output.exists() and Path(model).exists()):
            return
        if output.samefile(model):
            raise OutputError(f"--output {output} is the model itself; give another directory.")
        if output.resolve() in Path(model).resolve().parents:
            raise OutputError(f"--output {output} holds the model, which would be lost; give another directory.")


@contextmanager
def output_lock(output: Path, *, holds: str = "") -> Iterator[None]:
    """Hold the lock of an output; `OutputError` if another run has it.

    Args:
        holds: what the lock is on, where it is not the output itself.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(output / holds if holds else output))
        except LockedError:
            raise OutputError(
                f"another run is working on --output {output}; wait for it, or choose another name."
            ) from None
        yield


@contextmanager
def new_folders(directory: Path) -> Iterator[None]:
    """Make a directory; folders made for it that hold nothing in the end are gone again on exit. Raises `OSError`."""
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with signals_wait():
            for place in made:
                with suppress(OSError):  # holds the output, or what someone else has put there meanwhile
                    place.rmdir()


@contextmanager
def refusing(output: Path) -> Iterator[None]:
    """Say of errors of the file system, before any work is done, that the output cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"--output {output} cannot be written ({why(error)}); choose a directory that you may write to."
        ) from error


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Say of errors of the file system that writing the output has failed. Nothing of it is left then."""
    try:
        yield
    except OSError as error:
        raise LayerSurgeryError(
            f"writing to --output {output} failed ({why(error)}); nothing half-written is left."
        ) from error


def _prefix(output: Path) -> str:
    return f".{output.name}.partial-"


def _put_in_place(staging: Path, output: Path, *, overwrite: bool, note: Note) -> None:
    """Rename what is finished to the output; `OutputError` if something that may not be replaced is there now."""
    problem: str | None = "has appeared"
    try:
        rename_new(staging, output)
        return
    except OSError:
        if not os.path.lexists(output):
            raise
    if overwrite:
        problem = _replace(staging, output, note)
    if problem is not None:
        kept = _keep(staging, output, "")
        raise OutputError(
            f"--output {output} {problem} while this run worked, and is not replaced; what was made is in {kept}."
        )


def _replace(staging: Path, output: Path, note: Note) -> str | None:
    """Put the new result in the place of the old one and remove that; return why it cannot be done, or None.

    The old one is looked at when it has gone from its place, so that nothing can be put there behind our back.
    """
    old = staging.with_name(_OLD)
    if exchange(staging, output):
        if (problem := _may_not_go(staging)) is not None:
            exchange(staging, output)
            return problem
        staging.rename(old)  # a name that says what it is, should this be as far as we get
    else:
        output.rename(old)
        try:
            problem = _may_not_go(old)
            if problem is None:
                rename_new(staging, output)
        finally:  # as it was, if anything went wrong
            if not os.path.lexists(output):
                _restore(old, output)
        if problem is not None:
            return problem
    sync(output.parent)
    _remove_old(old, output, note)
    return None


def _restore(old: Path, output: Path) -> None:
    """Put an old result back into its place; if even that fails, leave it to the next run, and say where it is."""
    try:
        rename_new(old, output)
    except OSError as error:
        leave_behind(old.parent)
        raise LayerSurgeryError(
            f"--output {output} could not be replaced, nor put back into its place ({why(error)}); it is in {old}, and "
            "the next run with this --output puts it back."
        ) from error


def _may_not_go(old: Path) -> str | None:
    """Return why what was in the output's place may not be removed, or None."""
    if old.is_symlink() or not old.is_dir():
        return "has become a file or a link"
    return not_ours(old)


def _remove_old(old: Path, output: Path, note: Note) -> None:
    try:
        remove_result(old)
    except OSError as error:
        try:
            kept = _keep(old, output, "old-")
        except OSError:
            kept = old
            leave_behind(old.parent)
        note(f"warning: the old result could not be removed ({why(error)}); what is left of it is in {kept}")


def _keep(directory: Path, output: Path, word: str) -> Path:
    """Rename a directory to the first free name of `output-2`, `output-3`, ...; `word` stands before the number."""
    number = 2
    while True:
        try:
            kept = output.with_name(f"{output.name}-{word}{number}")
            rename_new(directory, kept)
            return kept
        except OSError:
            if not os.path.lexists(kept):
                raise
        number += 1


def _put_right(output: Path, note: Note) -> None:
    """Restore and remove what runs that were killed have left beside an output. The caller holds its lock."""
    for work in dead_directories(output.parent, _prefix(output)):
        old = work / _OLD
        if old.is_dir() and not os.path.lexists(output):
            rename_new(old, output)
            sync(output.parent)
            note(f"a run that was killed had put {output} aside; it is back in its place")
        elif old.is_dir() and not_ours(old) is not None:
            note(f"the result that a run which was killed has replaced is in {_keep(old, output, 'old-')}")
        shutil.rmtree(work, ignore_errors=True)
        note(f"removed {work.name}, which a run that was killed has left beside {output}")
