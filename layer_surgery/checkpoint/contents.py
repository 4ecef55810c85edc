"""The files of a result: which they are, what they held when they were written, and what in its directory is not ours.

`surgery.json` lists them, so that replacing a result removes these and nothing that someone has put beside them.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layer_surgery.checkpoint import modeling_layer_surgery
from layer_surgery.checkpoint.tensors import INDEX_FILE, SINGLE_FILE
from layer_surgery.disk.reading import TEXT_BYTES, check_regular, read_bytes, read_json
from layer_surgery.records.reading import REPORT_FILE
from layer_surgery.records.seal import is_unedited
from layer_surgery.records.surgery import FileRecord

#: What every output has beside its weights, made from the report, and made again by `report`.
PAGE_FILES = ("report.html", "README.md")
#: Folder of a tokenizer with several chat templates.
TEMPLATES_FOLDER = "additional_chat_templates"
CODE_FILE = Path(modeling_layer_surgery.__file__)
#: Files that releases up to 0.2, which kept no list, have written under these names and no others.
_UNLISTED = {
    *("config.json", "generation_config.json", INDEX_FILE, SINGLE_FILE, CODE_FILE.name, *PAGE_FILES),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt", "NOTICE.md"),
}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_WEIGHTS = ".safetensors"


def list_files(directory: Path, progress: Callable[[], None] = lambda: None) -> dict[str, FileRecord]:
    """Return every file of a new result, but for `surgery.json`, with its size and hash.

    Page and card are listed without: they may be made again. `progress` is called after each file.
    """
    records = dict.fromkeys(PAGE_FILES, FileRecord(bytes=None, sha256=None))
    for name in sorted(files_in(directory)):
        if name not in (REPORT_FILE, *PAGE_FILES):
            path = directory / name
            records[name] = FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))
        progress()
    return records


def listed_files(data: Mapping[str, Any]) -> dict[str, FileRecord] | None:
    """Return the list in what a `surgery.json` holds; None if it has none. Raises `ValueError` for a wrong one."""
    if "files" not in data:
        return None
    files = data["files"]
    try:
        records = {name: FileRecord(bytes=each["bytes"], sha256=each["sha256"]) for name, each in files.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its list of files is damaged ({error!r})") from error
    for name, record in records.items():
        if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
            raise ValueError(f"its list of files names '{name}', which is not in it")
        if type(record.bytes) not in (int, type(None)) or type(record.sha256) not in (str, type(None)):
            raise ValueError(f"its list of files is damaged at '{name}'")
    return records


def not_ours(directory: Path) -> str | None:
    """Return why a directory is not a result of Layer Surgery alone, as `holds chapter.tex`; None if it is, or empty.

    Weights are compared by size, all else by content: what was changed since it was written is somebody's work too.
    """
    found = sorted(files_in(directory))
    if not found and not any(directory.iterdir()):
        return None
    folders = {str(parent) for name in found for parent in Path(name).parents} | {"."}
    try:
        data = read_json(directory / REPORT_FILE)
        listed = listed_files(data)
    except FileNotFoundError:
        stranger = next((name for name in found if name not in _UNLISTED), None)
        return f"holds {stranger}" if stranger else f"has no {REPORT_FILE}"
    except (OSError, ValueError, TypeError):
        return f"has a {REPORT_FILE} that cannot be read"
    for name in found:
        if name != REPORT_FILE and (problem := _problem(directory, name, listed)):
            return problem
    empty = next((name for name in _folders(directory) if name not in folders), None)
    return f"holds {empty}" if empty else None


def remove_result(directory: Path) -> None:
    """Remove a result that `not_ours` has found to be ours: the files that it has then, and folders that are empty.

    Raises `OSError` if something cannot be removed, or has come since.
    """
    for name in sorted(files_in(directory)):
        (directory / name).unlink()
    for name in sorted(_folders(directory), reverse=True):
        (directory / name).rmdir()
    directory.rmdir()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hexadecimal) of a regular file. Raises `OSError`."""
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(directory: Path, name: str, listed: Mapping[str, FileRecord] | None) -> str | None:
    """Return what is wrong with a file of a directory that is to be replaced, or None."""
    path = directory / name
    if path.is_symlink() or not path.is_file():
        return f"holds {name}, which is no file of its own"
    if name in PAGE_FILES and (listed is None or name in listed):
        # Pages of releases up to 0.2 have no seal.
        edited = (listed is not None or name != "report.html") and not _is_unedited(path)
        return f"holds {name}, which was changed since it was written" if edited else None
    if listed is None:
        return None if _written_by_0_2(directory, name) else f"holds {name}"
    if name not in listed:
        return f"holds {name}"
    record = listed[name]
    changed = path.stat().st_size != record.bytes if name.endswith(_WEIGHTS) else file_sha256(path) != record.sha256
    return f"holds {name}, which was changed since it was written" if changed else None


def _is_unedited(path: Path) -> bool:
    try:
        return is_unedited(read_bytes(path).decode("utf-8"))
    except (OSError, ValueError):
        return False


def _written_by_0_2(directory: Path, name: str) -> bool:
    """Return whether a release that kept no list may have written a file of this name, and only such a release."""
    folder, _, last = name.rpartition("/")
    if folder:
        return folder == TEMPLATES_FOLDER and last.endswith(".jinja")
    if name in _UNLISTED or _SHARD.fullmatch(name):
        return True
    try:
        modules = read_json(directory / "config.json", TEXT_BYTES).get("auto_map", {}).values()
        return name in {f"{str(module).partition('.')[0]}.py" for module in modules}
    except (OSError, ValueError, AttributeError):
        return False


def files_in(directory: Path) -> Iterator[str]:
    """Yield all that is no folder below a directory, as paths relative to it; links are not followed."""
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(folder) / name).relative_to(directory).as_posix()


def _folders(directory: Path) -> Iterator[str]:
    """Yield the folders below a directory, as paths relative to it; links are not followed."""
    for folder, folders, _ in os.walk(directory):
        for name in folders:
            path = Path(folder) / name
            if not path.is_symlink():
                yield path.relative_to(directory).as_posix()
