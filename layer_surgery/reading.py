"""Records read back from JSON: every field is there and of its type, or the reading stops with the place."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def read_record(cls: type[T], data: Any, where: str = "") -> T:
    """Return the dataclass `cls` made from what `json.loads` gave for its `dataclasses.asdict`.

    Fields may be plain values, lists, dictionaries with string keys, other dataclasses, and unions of these. Raises
    `ValueError`, which names the place (such as `points[3].result.layers`), for what is missing, unknown or of another
    type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'the file'} is not an object")
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in sorted(fields ^ data.keys()):
        raise ValueError(f"{_join(where, name)} is {'missing' if name in fields else 'unknown'}")
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints[name], value, _join(where, name)) for name, value in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _any_of(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
    elif origin is list:
        if isinstance(value, list):
            return [_value(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {key: _value(arguments[1], item, _join(where, key)) for key, item in value.items()}
    elif dataclasses.is_dataclass(hint):
        return read_record(hint, value, where)  # type: ignore[arg-type]
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    raise ValueError(f"{where} is {str(value)[:40]!r}, which is not of its type")


def _any_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    others = [hint for hint in hints if hint is not type(None)]
    for hint in others[:-1]:
        try:
            return _value(hint, value, where)
        except ValueError:
            continue
    return _value(others[-1], value, where)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
