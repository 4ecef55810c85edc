"""A sweep on disk: `sweep.json`, and the same as a table in `sweep.csv` and `sweep.md`."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from layer_surgery import parallel
from layer_surgery.checkpoint.contents import PAGE_FILES, remove_result
from layer_surgery.checkpoint.output import check_output, new_folders, output_lock, refusing, writing
from layer_surgery.disk.locks import LockedError, lock_file, locked
from layer_surgery.disk.writing import write_atomically
from layer_surgery.errors import OutputError
from layer_surgery.records.reading import SWEEP_FILE
from layer_surgery.records.sweep import SweepReport
from layer_surgery.reporting.sweep_table import csv_text, markdown_text
from layer_surgery.runs.session import SCRATCH_PREFIX

BEST_FOLDER = "best"


def check_sweep_directory(directory: Path) -> None:
    """Raise `OutputError` for an output that is neither new, nor empty, nor a sweep's."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise OutputError(f"--output {directory} is a file or a link; give the name of a directory.")
    entries = sorted(entry.name for entry in directory.iterdir()) if directory.exists() else []
    left = (SCRATCH_PREFIX, f".{SWEEP_FILE}.partial-", lock_file(Path(SWEEP_FILE)).name)  # by a run that was killed
    entries = [name for name in entries if not name.startswith(left)]
    if entries and SWEEP_FILE not in entries:
        raise OutputError(
            f"--output {directory} holds {entries[0]} and no {SWEEP_FILE}, so it is not a sweep's; give the name of a "
            "new directory, or of one that holds a sweep."
        )


def check_best(directory: Path) -> None:
    """Raise `OutputError` if there is a `best` in a sweep's directory that may not be replaced."""
    best = directory / BEST_FOLDER
    if best.exists():
        check_output(best, overwrite=True)


@contextmanager
def sweep_directory(directory: Path) -> Iterator[Path]:
    """Make the directory and lock it, or raise `OutputError`; if nothing was written there, it is gone again on exit.

    The lock is on `sweep.json`: two sweeps that write it would each lose what the other has found.
    """
    with ExitStack() as stack:
        with refusing(directory):
            stack.enter_context(new_folders(directory))
            stack.enter_context(output_lock(directory, holds=SWEEP_FILE))
        best = directory / BEST_FOLDER
        if lock_file(best).exists():  # which an earlier sweep could not remove: taken, it goes, if nobody has it
            with suppress(LockedError, OSError), locked(best):
                pass
        yield directory


def clear_sweep(directory: Path) -> None:
    """Remove the page and the best model of an old sweep; its other files are replaced."""
    parallel.from_first(lambda: _clear(directory))


def _clear(directory: Path) -> None:
    check_best(directory)
    with writing(directory):
        (directory / PAGE_FILES[0]).unlink(missing_ok=True)
        if (directory / BEST_FOLDER).exists():
            remove_result(directory / BEST_FOLDER)


def write_sweep(directory: Path, report: SweepReport) -> None:
    """Write the report in all its forms, each file at once: a run that is killed leaves the last one whole."""
    if not parallel.is_first():
        return
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files = {SWEEP_FILE: text, "sweep.csv": csv_text(report), "sweep.md": markdown_text(report)}
    with writing(directory):
        for name, content in files.items():
            write_atomically(directory / name, content)
