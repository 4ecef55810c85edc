"""Rows of a table as documents: the columns that count, and the checks of their fields."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from layer_surgery.data.documents import Chat, Document, Example, Kind, Labelled, Tagged, Text, Wanted
from layer_surgery.errors import DataError, nearest_name

PROMPT_COLUMNS = ("prompt", "question")
ANSWER_COLUMNS = ("answer", "completion", "response")

PAIR_COLUMNS = ("sentence1", "sentence2")
LABEL_COLUMNS = ("label", "labels", "score")
WORD_COLUMN, TAG_COLUMNS = "tokens", ("tags", "ner_tags")

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


def documents_from(table: Table, column: str | None = None, wanted: Wanted = "text") -> tuple[Kind, list[Document]]:
    """Turn the rows of `table` into documents of one kind.

    Where labels are wanted, a `text` column (or `column`), or `sentence1` and `sentence2`, and a column of labels
    (`label`, `labels` or `score`) make `Labelled`s; where tags are, `tokens` and `tags` (or `ner_tags`) make `Tagged`s.

    Otherwise: with `column`, every row is a `Text` of that column. Without: prompt and answer columns make `Example`s,
    else a `messages` column makes `Chat`s, else a `text` column makes `Text`s.

    Raises `DataError`: no such column, no known one, no rows, or a field that is missing, not text, or blank.
    """
    if not table.columns:
        raise DataError(f"{table.name} has no rows; pass data with at least one.")
    if column is not None and column not in table.columns:
        raise DataError(
            f"{table.name} has no column '{column}' (--text-column);{nearest_name(column, table.columns)} "
            f"it has: {_listed(table.columns)}."
        )
    if wanted == "labels":
        return "labelled", _labelled(table, column)
    if wanted == "tags":
        return "tagged", _tagged(table)
    if column is not None:
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
    raise DataError(
        f"{table.name} has the columns {_listed(table.columns)}, but needs {ALLOWED_COLUMNS}; rename the columns, or "
        "choose one as text with --text-column."
    )


def _labelled(table: Table, column: str | None) -> list[Document]:
    texts = (column,) if column is not None else ("text",) if "text" in table.columns else PAIR_COLUMNS
    label = next((name for name in LABEL_COLUMNS if name in table.columns), None)
    if label is None or not set(texts) <= set(table.columns):
        raise DataError(
            f"{table.name} has the columns {_listed(table.columns)}, but a model that classifies texts needs text, or "
            f"{' and '.join(PAIR_COLUMNS)}, together with {' or '.join(LABEL_COLUMNS)}; rename the columns, or choose "
            "one as text with --text-column."
        )
    first, *second = texts

    def make(row: Row, at: str) -> Labelled:
        pair = _text(row, second[0], at) if second else None
        return Labelled(_text(row, first, at), _filled(row, label, at), pair)

    return _collect(table, [*texts, label], make)


def _tagged(table: Table) -> list[Document]:
    column = next((name for name in TAG_COLUMNS if name in table.columns), None)
    if column is None or WORD_COLUMN not in table.columns:
        raise DataError(
            f"{table.name} has the columns {_listed(table.columns)}, but a model that tags words needs {WORD_COLUMN} "
            f"together with {' or '.join(TAG_COLUMNS)}, both lists of one length; rename the columns."
        )

    def make(row: Row, at: str) -> Tagged:
        words, tags = _filled(row, WORD_COLUMN, at), _filled(row, column, at)
        for name, value in ((WORD_COLUMN, words), (column, tags)):
            if not isinstance(value, list) or not value:
                raise DataError(f"{at}: the field '{name}' must be a list of at least one item.")
        assert isinstance(words, list) and isinstance(tags, list)
        if len(words) != len(tags):
            raise DataError(f"{at}: {len(words)} {WORD_COLUMN} have {len(tags)} {column}; give every word one tag.")
        return Tagged([_text({WORD_COLUMN: word}, WORD_COLUMN, at) for word in words], list(tags))

    return _collect(table, [WORD_COLUMN, column], make)


def _filled(row: Row, column: str, at: str) -> object:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{at}: the field '{column}' is missing or empty; fill it in, or remove the row.")
    return value


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
