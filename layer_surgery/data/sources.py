"""Sources as the user names them (`bundled`, a file, a hub data set), read into documents."""

import os
from pathlib import Path
from typing import get_args

from layer_surgery.data.bundled import BUNDLED, load_bundled
from layer_surgery.data.documents import LoadedData, Purpose, Text, Wanted
from layer_surgery.data.hub import KNOWN_DATASETS, load_hub, parse_reference
from layer_surgery.data.rows import documents_from
from layer_surgery.data.tables import TABLE_SUFFIXES, read_table, read_utf8
from layer_surgery.errors import DataError, unknown_name

TEXT_SUFFIX = ".txt"
FILE_SUFFIXES = (TEXT_SUFFIX, *TABLE_SUFFIXES)


def known_sources() -> list[str]:
    """Return the names that may be passed as they are."""
    return [BUNDLED, *sorted(KNOWN_DATASETS)]


def load_documents(source: str, *, column: str | None = None, part: Purpose, wanted: Wanted = "text") -> LoadedData:
    """Read a data source completely.

    Args:
        source: one of `known_sources()`; or the path of a file with one of `FILE_SUFFIXES` (a `.txt` file is one
            text, exactly as it is); or a hub data set `OWNER/NAME`, with `#CONFIG` and `@SPLIT` where wanted. A known
            name wins over a file of that name (write `./c4` for the file).
        column: the column to read as text, for tables. Without it: `prompt` (or `question`) with `answer` (or
            `completion`, `response`) make examples; else `messages` make chats; else `text` makes texts.
        wanted: `labels` or `tags` for models that classify texts or words; see `documents_from`.
        part: which half of the bundled text, or which split of a hub data set without `@SPLIT`; a file is read whole
            for either.

    Returns: documents of one kind, in the source's order; at least one.
    Raises `DataError`: the source is unknown, missing, damaged or empty, or a row does not have the fields it needs.
    """
    if part not in get_args(Purpose):
        raise DataError(unknown_name("part", part, get_args(Purpose)))
    if source == BUNDLED:
        _refuse_column(source, column)
        _refuse_without_labels(source, wanted)
        return load_bundled(part)
    if source.partition("#")[0].partition("@")[0] not in KNOWN_DATASETS:
        # os.path answers False where Path raises: names too long for a file system, unknown users
        path = os.path.expanduser(source)
        if os.path.isdir(path):
            raise DataError(f"{source} is a folder; pass one file ({', '.join(FILE_SUFFIXES)}).")
        if os.path.exists(path) or _looks_like_path(source):
            return _load_file(source, Path(path), column, wanted)
    return load_hub(parse_reference(source, known_sources()), part, column, wanted)


def _looks_like_path(source: str) -> bool:
    """Whether a source that does not exist was meant as a file."""
    suffix = Path(source).suffix.lower()
    return (
        suffix in FILE_SUFFIXES
        or source.startswith((".", "/", "~"))
        or "\\" in source
        or ("/" not in source and suffix != "")
        or source.partition("#")[0].count("/") > 1
    )


def _load_file(source: str, path: Path, column: str | None, wanted: Wanted) -> LoadedData:
    if not os.path.exists(path):
        raise DataError(f"there is no file {source}; check the path.")
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise DataError(f"cannot read {source}: the suffix must be one of {', '.join(FILE_SUFFIXES)}.")
    if suffix == TEXT_SUFFIX:
        _refuse_column(source, column)
        _refuse_without_labels(source, wanted)
        text = read_utf8(path, keep_signature=True)
        if not text.strip():
            raise DataError(f"{source} is empty; pass a file with text.")
        return LoadedData(source, [Text(text)], "text")
    kind, documents = documents_from(read_table(path), column, wanted)
    return LoadedData(source, documents, kind)


def _refuse_column(source: str, column: str | None) -> None:
    if column is not None:
        raise DataError(f"{source} has no columns, so --text-column {column} does not apply; leave it out.")


def _refuse_without_labels(source: str, wanted: Wanted) -> None:
    if wanted != "text":
        columns = "tokens and tags" if wanted == "tags" else "text and label"
        raise DataError(
            f"{source} is text without {wanted}, but the model's head is a classifier; pass a table with {columns} "
            "(.jsonl, .json, .csv, .parquet or a hub data set) as --calibration and as --eval-data (--no-eval for "
            "none)."
        )
