"""Local files as tables: JSON lines, JSON, CSV and Parquet."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from layer_surgery.data.rows import Row, Table
from layer_surgery.disk.reading import check_regular, parse_json, read_bytes, why
from layer_surgery.errors import DataError

#: Text is read at once; what is larger is no calibration data, and would not fit into memory many times over.
DATA_BYTES = 4_000_000_000


def read_utf8(path: Path, *, keep_signature: bool = False) -> str:
    """Return the file's text exactly, line ends included.

    A UTF-8 signature (byte order mark), which some editors write, is dropped unless `keep_signature`.

    Raises `DataError`: the file cannot be opened, or is not UTF-8.
    """
    try:
        text = read_bytes(path, DATA_BYTES).decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {why(error)}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); convert it to UTF-8."
        ) from error
    return text if keep_signature else text.removeprefix("\ufeff")


def read_table(path: Path) -> Table:
    """Open a file by its suffix, one of `TABLE_SUFFIXES`.

    Raises `DataError`: the file cannot be read or parsed; says where.
    """
    return TABLE_SUFFIXES[path.suffix.lower()](path)


def _in_memory(path: Path, rows: list[tuple[str, Row]], columns: Sequence[str] | None = None) -> Table:
    found = dict.fromkeys(key for _, row in rows for key in row) if columns is None else columns
    return Table(str(path), tuple(found), lambda _: iter(rows))


def _parse_json(text: str, at: str, hint: str) -> object:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        place = "" if error.lineno == 1 else f"line {error.lineno}, "
        raise DataError(f"{at}: invalid JSON ({error.msg}, {place}column {error.colno}); {hint}.") from error
    except ValueError as error:
        raise DataError(f"{at}: JSON that cannot be read ({error}); {hint}.") from error


def _require_object(value: object, at: str) -> Row:
    if not isinstance(value, Mapping):
        raise DataError(f"{at}: must be an object with named fields, but is of type {type(value).__name__}.")
    return value


def _read_jsonl(path: Path) -> Table:
    """Read one JSON object per line; blank lines are no rows."""
    rows: list[tuple[str, Row]] = []
    # Only "\n" ends a line: JSON strings may hold the other characters that `str.splitlines` splits at.
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line.strip():
            value = _parse_json(line, f"{path}, line {number}", "a .jsonl file has one JSON object per line")
            rows.append((f"line {number}", _require_object(value, f"{path}, line {number}")))
    return _in_memory(path, rows)


def _read_json(path: Path) -> Table:
    text = read_utf8(path)
    if not text.strip():
        raise DataError(f"{path} is empty; a .json file has a list of objects.")
    value = _parse_json(text, str(path), "a .json file has one list of objects (one object per line is .jsonl)")
    if not isinstance(value, list):
        raise DataError(f"{path} must hold a list of objects, but holds a value of type {type(value).__name__}.")
    return _in_memory(
        path, [(f"row {n}", _require_object(row, f"{path}, row {n}")) for n, row in enumerate(value, start=1)]
    )


def _read_csv(path: Path) -> Table:
    """Read comma-separated rows with a header; row 1 is the first after it, and blank lines are no rows."""
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), strict=True)
    limit = csv.field_size_limit(2**31 - 1)
    try:
        header, *lines = [line for line in reader if line] or [[]]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: invalid CSV ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    if len(set(header)) < len(header):
        raise DataError(f"{path} has a column name twice in its header ({', '.join(header)}); rename one.")
    rows: list[tuple[str, Row]] = []
    for number, fields in enumerate(lines, start=1):
        if len(fields) > len(header):
            raise DataError(
                f"{path}, row {number}: {len(fields)} fields, but the header names {len(header)}; quote fields that "
                "hold commas."
            )
        rows.append((f"row {number}", dict(zip(header, fields, strict=False))))
    return _in_memory(path, rows, header)


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    failures = (OSError, ValueError, NotImplementedError, pyarrow.ArrowException)
    try:
        check_regular(path)
        file = pyarrow.parquet.ParquetFile(path)
        columns = tuple(file.schema_arrow.names)
    except failures as error:
        raise DataError(f"{path} cannot be read as Parquet ({_first_line(error)}).") from error

    def read(wanted: Sequence[str]) -> Iterator[tuple[str, Row]]:
        number = 0
        try:
            for batch in file.iter_batches(columns=list(wanted)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except failures as error:
            raise DataError(
                f"{path}: the Parquet data after row {number} is damaged ({_first_line(error)})."
            ) from error

    return Table(str(path), columns, read)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


TABLE_SUFFIXES: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
