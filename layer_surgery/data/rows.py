"""Rows of a table as documents: the columns that count, and the checks of their fields."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from layer_surgery.data.documents import Chat, Document, Example, Kind, Text
from layer_surgery.errors import DataError, nearest_name

PROMPT_COLUMNS = ("prompt", "question")
ANSWER_COLUMNS = ("answer", "completion", "response")

ALLOWED_COLUMNS = (
    f"{PROMPT_COLUMNS[0]} (or {PROMPT_COLUMNS[1]}) together with {ANSWER_COLUMNS[0]} (or "
    f"{' or '.join(ANSWER_COLUMNS[1:])}); or messages; or text"
)

Row = Mapping[str, object]

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """Rows with named columns, read when asked for."""

    name: str  #: Names the source in error messages.
    columns: tuple[str, ...]  #: All columns found, in the source's order.
    read: Callable[[Sequence[str]], Iterator[tuple[str, Row]]]
    """Yields the place of a row (`"line 3"`) and the row, which has at least those of the asked columns it holds."""


def documents_from(table: Table, column: str | None = None) -> tuple[Kind, list[Document]]:
    """Turn the rows of `table` into documents of one kind.

    With `column`, every row is a `Text` of that column. Without: prompt and answer columns make `Example`s, else
    a `messages` column makes `Chat`s, else a `text` column makes `Text`s.

    Raises `DataError`: no such column, no known one, no rows, or a field that is missing, not text, or blank.
    """
    if column is not None:
        if column not in table.columns:
            raise DataError(
                f"{table.name} has no column '{column}' (--text-column);{nearest_name(column, table.columns)} "
                f"it has: {_listed(table.columns)}."
            )
        return "text", _collect(table, [column], lambda row, at: Text(_text(row, column, at)))
    prompt = next((name for name in PROMPT_COLUMNS if name in table.columns), None)
    answer = next((name for name in ANSWER_COLUMNS if name in table.columns), None)
    if prompt is not None and answer is not None:
        return "example", _collect(
            table, [prompt, answer], lambda row, at: Example(_text(row, prompt, at), _text(row, answer, at))
        )
    if "messages" in table.columns:
        return "chat", _collect(table, ["messages"], lambda row, at: Chat(_messages(row, at)))
    if "text" in table.columns:
        return "text", _collect(table, ["text"], lambda row, at: Text(_text(row, "text", at)))
    if not table.columns:
        raise DataError(f"{table.name} has no rows; pass data with at least one.")
    raise DataError(
        f"{table.name} has the columns {_listed(table.columns)}, but needs {ALLOWED_COLUMNS}; rename the columns, or "
        "choose one as text with --text-column."
    )


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) if columns else "none"


def _collect(table: Table, columns: Sequence[str], make: Callable[[Row, str], Document]) -> list[Document]:
    documents = [make(row, f"{table.name}, {place}") for place, row in table.read(columns)]
    if not documents:
        raise DataError(f"{table.name} has no rows; pass data with at least one.")
    return documents


def _text(row: Row, column: str, at: str) -> str:
    """Return the field as text that a tokenizer can take; `at` names source and row."""
    value = row.get(column)
    if value is None:
        raise DataError(f"{at}: the field '{column}' is missing; give every row a text there, or remove the row.")
    if not isinstance(value, str):
        raise DataError(f"{at}: the field '{column}' must be text, but is of type {type(value).__name__}.")
    if not value.strip():
        raise DataError(f"{at}: the field '{column}' is empty; give every row a text there, or remove the row.")
    if _SURROGATE.search(value):
        raise DataError(f"{at}: the field '{column}' has half a surrogate pair, which is no character; remove it.")
    return value


def _messages(row: Row, at: str) -> list[dict[str, str]]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{at}: the field 'messages' must be a list of at least one message with role and content.")
    checked = [_message(message, f"{at}, message {number}") for number, message in enumerate(messages, start=1)]
    roles = [message["role"] for message in checked]
    if "assistant" not in roles or roles[0] == "assistant":
        raise DataError(f"{at}: 'messages' needs a message of role 'assistant' after one of another role to answer.")
    return checked


def _message(message: object, at: str) -> dict[str, str]:
    """Return a message with its fields checked; fields that are null (a table's filling) are left out."""
    if not isinstance(message, Mapping):
        raise DataError(f"{at}: must have the fields role and content, but is of type {type(message).__name__}.")
    fields = {str(key) for key, value in message.items() if value is not None} | {"role", "content"}
    return {field: _text(message, field, at) for field in sorted(fields)}
