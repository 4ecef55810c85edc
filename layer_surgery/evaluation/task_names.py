"""Names of lm-eval tasks, looked up without lm-eval, whose import and index of 14,000 files take half a minute."""

import re
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from layer_surgery.config import TaskConfig
from layer_surgery.errors import DataError, nearest_name

_FILES = (".yaml", ".yml")
_NAME = re.compile(rb"^\s*(?:-\s*)?(?:task|group|tag)\s*:\s*[\"']?([\w.+-]+)", re.MULTILINE)


def check_task_names(config: TaskConfig, bundled: Callable[[], Path]) -> None:
    """Raise `DataError` for a task whose name stands in no configuration, neither lm-eval's nor the user's.

    Names that stand in one may still be none; that is found when the tasks are loaded. `bundled` returns the
    directory of the tasks that come with the project.
    """
    wanted = {name for name in config.tasks if not name.endswith(_FILES)}
    if not wanted:
        return
    for text in _configurations([bundled(), *config.task_path]):
        wanted = {name for name in wanted if name.encode() not in text}
    known: set[str] = set()
    for text in _configurations(_own_folders()) if wanted else ():
        wanted = {name for name in wanted if name.encode() not in text}
        if not wanted:
            return
        known |= {found.decode(errors="replace") for found in _NAME.findall(text)}
    if wanted:
        raise unknown_task(min(wanted), known)


def unknown_task(name: str, known: Iterable[str]) -> DataError:
    """Return the error for a task that there is not."""
    return DataError(
        f"unknown task '{name}'.{nearest_name(name, known)} Name tasks of lm-eval, `bundled`, a YAML file, or tasks of "
        "your own with --task-path DIR."
    )


def _own_folders() -> list[Path]:
    """Return the folder of lm-eval's own tasks."""
    package = find_spec("lm_eval")
    return [Path(place) / "tasks" for place in (package.submodule_search_locations or ())] if package else []


def _configurations(folders: Iterable[Path]) -> Iterator[bytes]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.suffix in _FILES and path.is_file():
                yield path.read_bytes()
