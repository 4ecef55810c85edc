"""Records read back from JSON files that a release of this tool has written. What is damaged is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from layer_surgery.errors import ReportError

T = TypeVar("T")
#: Larger files are none of ours: even with every layer of a very large model operated on it is a tenth of this.
_MOST_BYTES = 200_000_000


def read_json(file: Path, schema_version: int, advice: str) -> dict[str, Any]:
    """Return the object in a file of at most this schema version. Raises `ReportError`, which ends with the advice."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ReportError(f"{file} has more than {_MOST_BYTES:,} bytes, so it is none of ours; {advice}.")
        data = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse, parse_float=_finite)
    except OSError as error:
        raise ReportError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ReportError(f"{file} is damaged: it is not JSON ({reason}); {advice}.") from error
    if not isinstance(data, dict):
        raise ReportError(f"{file} is damaged: it is not an object; {advice}.")
    version = data.get("schema_version")
    if type(version) is not int or version < 1:
        raise ReportError(f"{file} is damaged: its schema_version is {version!r}; {advice}.")
    if version > schema_version:
        raise ReportError(
            f"{file} has schema version {version}, and this release reads up to {schema_version}; take a newer "
            f"layer-surgery, or {advice}."
        )
    return data


def validated(cls: type[T], data: dict[str, Any], file: Path, advice: str) -> T:
    """Return the record `cls` made of what `read_json` gave. Raises `ReportError`, which names the first wrong place.

    A field that is not there has its default: an older release did not write it.
    """
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(f"{file} is damaged at '{where}': {first['msg'].lower()}; {advice}.") from error


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value
