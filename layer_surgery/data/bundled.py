"""The text that comes with the project, checked against its manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from layer_surgery.data.documents import Document, LoadedData, Part, Text
from layer_surgery.errors import DataError

BUNDLED = "bundled"
TASKS = "tasks"
"""Folder of the bundled tasks."""

_PACKAGE = Path(__file__).resolve().parents[1]


def bundled_directory() -> Path:
    """Return the folder of the bundled text: inside an installed package, or at the root of a checkout.

    Raises:
        DataError: neither exists.
    """
    candidates = (_PACKAGE / "calibration_data", _PACKAGE.parent / "calibration_data")
    for directory in candidates:
        if (directory / "MANIFEST.json").is_file():
            return directory
    raise DataError(
        f"the bundled text is not there (no MANIFEST.json in {' or '.join(map(str, candidates))}); reinstall Layer "
        "Surgery, or pass a file of your own."
    )


def load_bundled(part: Part) -> LoadedData:
    """Read one part of the bundled text: one `Text` per file, in the order of file names, final newlines dropped.

    Raises:
        DataError: a file is missing, unlisted or differs from the manifest; names it.
    """
    directory = bundled_directory()
    expected = _read_manifest(directory, part)
    found = {path.name for path in (directory / part).glob("*.txt")}
    for name in sorted(found ^ expected.keys()):
        problem = "missing" if name in expected else "not listed in MANIFEST.json"
        raise DataError(f"the bundled text is damaged: {directory / part / name} is {problem}; {_REMEDY}.")
    documents: list[Document] = []
    for name in sorted(expected):
        path = directory / part / name
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != expected[name]:
            raise DataError(
                f"the bundled text is damaged: {path} differs from its SHA-256 in MANIFEST.json; {_REMEDY}."
            )
        documents.append(Text(content.decode("utf-8").rstrip("\n")))
    if not documents:
        raise DataError(f"the bundled text is damaged: MANIFEST.json lists no {part} documents; {_REMEDY}.")
    return LoadedData(BUNDLED, documents, "text", f"the {part} part of the bundled text, {len(documents)} documents")


def bundled_tasks() -> Path:
    """Return the folder of the bundled lm-eval tasks, every file of which is as the manifest says.

    Raises:
        DataError: a file is missing, unlisted or differs from the manifest; names it.
    """
    directory = bundled_directory()
    try:
        manifest = json.loads((directory / "MANIFEST.json").read_text(encoding="utf-8"))
        expected = {str(entry["file"]): str(entry["sha256"]) for entry in manifest["tasks"]["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the bundled tasks are damaged: {directory / 'MANIFEST.json'} cannot be read; {_REMEDY}."
        ) from error
    folder = directory / TASKS
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_file()
    }
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            problem = "missing" if name not in found else "not as MANIFEST.json says"
            raise DataError(f"the bundled tasks are damaged: {folder / name} is {problem}; {_REMEDY}.")
    return folder


_REMEDY = "reinstall Layer Surgery, or in a checkout run calibration_data/build_manifest.py if the change is meant"


def _read_manifest(directory: Path, part: Part) -> dict[str, str]:
    """Map file names to SHA-256 (hexadecimal)."""
    path = directory / "MANIFEST.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {str(entry["file"]): str(entry["sha256"]) for entry in manifest["parts"][part]["documents"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the bundled text is damaged: {path} cannot be read; {_REMEDY}.") from error
