"""The text, the tasks and the retrieval sets that come with the project, checked against their manifest."""

import hashlib
from pathlib import Path
from typing import Any

from layer_surgery.data.documents import Document, LoadedData, Purpose, Text
from layer_surgery.disk.reading import read_json
from layer_surgery.errors import DataError

BUNDLED = "bundled"
_PACKAGE = Path(__file__).resolve().parents[1]
_REMEDY = "reinstall Layer Surgery, or in a checkout run calibration_data/build_manifest.py if the change is meant"


def bundled_directory() -> Path:
    """Return the folder of the bundled text: inside an installed package, or at the root of a checkout.

    Raises `DataError`: neither exists.
    """
    candidates = (_PACKAGE / "calibration_data", _PACKAGE.parent / "calibration_data")
    for directory in candidates:
        if (directory / "MANIFEST.json").is_file():
            return directory
    raise DataError(
        f"the bundled text is not there (no MANIFEST.json in {' or '.join(map(str, candidates))}); reinstall Layer "
        "Surgery, or pass a file of your own."
    )


def load_bundled(part: Purpose) -> LoadedData:
    """Read one part of the bundled text: one `Text` per file, in the order of file names, final newlines dropped.

    Raises `DataError`: a file is missing, unlisted or differs from the manifest; names it.
    """
    directory = bundled_directory()
    expected = _listed_files(directory, "text", "parts", part, "documents")
    found = {path.name for path in (directory / part).glob("*.txt")}
    for name in sorted(found ^ expected.keys()):
        problem = "missing" if name in expected else "not listed in MANIFEST.json"
        raise _damaged("text", f"{directory / part / name} is {problem}")
    documents: list[Document] = []
    for name in sorted(expected):
        path = directory / part / name
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != expected[name]:
            raise _damaged("text", f"{path} differs from its SHA-256 in MANIFEST.json")
        documents.append(Text(content.decode("utf-8").rstrip("\n")))
    if not documents:
        raise _damaged("text", f"MANIFEST.json lists no {part} documents")
    return LoadedData(BUNDLED, documents, "text", f"the {part} part of the bundled text, {len(documents)} documents")


def bundled_tasks() -> Path:
    """Return the folder of the bundled lm-eval tasks, every file of which is as the manifest says.

    Raises `DataError`: a file is missing, unlisted or differs from the manifest; names it.
    """
    return _checked_folder("tasks", "tasks")


def bundled_retrieval() -> Path:
    """Return the folder of the bundled queries and passages, checked in the same way."""
    return _checked_folder("retrieval", "retrieval sets")


def _checked_folder(name: str, what: str) -> Path:
    directory = bundled_directory()
    folder = directory / name
    expected = _listed_files(directory, what, name, "files")
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            problem = "missing" if name not in found else "not as MANIFEST.json says"
            raise _damaged(what, f"{folder / name} is {problem}")
    return folder


def _listed_files(directory: Path, what: str, *keys: str) -> dict[str, str]:
    """Map the names of the files that the manifest lists under these keys to their SHA-256 (hexadecimal)."""
    path = directory / "MANIFEST.json"
    try:
        entries: Any = read_json(path)
        for key in keys:
            entries = entries[key]
        return {str(entry["file"]): str(entry["sha256"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(what, f"{path} cannot be read") from error


def _damaged(what: str, problem: str) -> DataError:
    verb = "is" if what == "text" else "are"
    return DataError(f"the bundled {what} {verb} damaged: {problem}; {_REMEDY}.")
