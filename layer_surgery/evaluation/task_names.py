"""Names of tasks, looked up without lm-eval and mteb, whose imports and indices of thousands of files take long."""

import re
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from layer_surgery.config import TaskConfig
from layer_surgery.errors import DataError, nearest_name

_FILES = (".yaml", ".yml")
_NAME = re.compile(rb"^\s*(?:-\s*)?(?:task|group|tag)\s*:\s*[\"']?([\w.+-]+)", re.MULTILINE)
_CLASS_NAME = re.compile(rb"^\s+name=\"([^\"]+)\",$", re.MULTILINE)
_MISSING = " (which is not installed: pip install mteb)"


def check_task_names(config: TaskConfig, bundled: Callable[[], Path]) -> None:
    """Raise `DataError` for a task whose name stands in no file, neither lm-eval's nor mteb's nor the user's.

    Names that stand in one may still be none, or none for this model; that is found when the tasks are loaded.
    `bundled` returns the directory of the tasks that come with the project.
    """
    wanted = {name for name in config.tasks if not name.endswith(_FILES)}
    wanted -= {name for name in wanted if any(stands_in(own_classes(config.task_path), name))}
    if not wanted:
        return
    for text in _configurations([bundled(), *config.task_path]):
        wanted = {name for name in wanted if name.encode() not in text}
    known: set[str] = set()
    for text in _configurations(_folders_of("lm_eval")) if wanted else ():
        wanted = {name for name in wanted if name.encode() not in text}
        if not wanted:
            return
        known |= {found.decode(errors="replace") for found in _NAME.findall(text)}
    for file in own_classes(_folders_of("mteb")) if wanted else ():
        text = file.read_bytes()
        wanted = {name for name in wanted if _quoted(name) not in text}
        if not wanted:
            return
        known |= {found.decode(errors="replace") for found in _CLASS_NAME.findall(text)}
    if wanted:
        raise unknown_task(min(wanted), known)


def unknown_task(name: str, known: Iterable[str]) -> DataError:
    """Return the error for a task that there is not."""
    return DataError(
        f"unknown task '{name}'.{nearest_name(name, known)} Name tasks of lm-eval, `bundled`, a YAML file, or tasks of "
        f"your own with --task-path DIR; for embedding models tasks of mteb{_MISSING * (not mteb_is_here())}."
    )


def mteb_is_here() -> bool:
    """Return whether mteb is installed."""
    return find_spec("mteb") is not None


def own_classes(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the files under some folders that may define tasks of mteb."""
    for folder in folders:
        yield from sorted(path for path in folder.rglob("*.py") if path.is_file())


def stands_in(files: Iterable[Path], name: str) -> Iterator[Path]:
    """Yield the files of Python in which the name of a task of mteb stands in quotes."""
    yield from (file for file in files if _quoted(name) in file.read_bytes())


def _quoted(name: str) -> bytes:
    """Return the name as it stands in a file of mteb; what follows a colon is a subset of the task's."""
    return f'"{name.partition(":")[0]}"'.encode()


def _folders_of(package_name: str) -> list[Path]:
    """Return the folder of a package's own tasks."""
    package = find_spec(package_name)
    return [Path(place) / "tasks" for place in (package.submodule_search_locations or ())] if package else []


def _configurations(folders: Iterable[Path]) -> Iterator[bytes]:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.suffix in _FILES and path.is_file():
                yield path.read_bytes()
