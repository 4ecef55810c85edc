"""The records that a data source is read into, before any tokenizer is involved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Purpose: TypeAlias = Literal["calibration", "evaluation"]
"""Purpose of the data: it decides which half of the bundled text, or which split of a hub data set, is read."""

Kind: TypeAlias = Literal["text", "example", "chat", "labelled", "tagged"]
"""All documents of one source are of one kind."""


Wanted: TypeAlias = Literal["text", "labels", "tags"]
"""What a model learns from: text by itself (or answers in it), a label for each text, or a tag for each word."""


@dataclass(frozen=True)
class Text:
    """Running text; every token carries loss."""

    text: str


@dataclass(frozen=True)
class Example:
    """A task example; only the answer carries loss."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """A conversation; only the assistant's turns carry loss. Each message has at least `role` and `content`."""

    messages: list[dict[str, str]]


@dataclass(frozen=True)
class Labelled:
    """A text, or two that belong together, with the answer for the whole as it stands in the data."""

    text: str
    label: object  #: A name or number of a label, a list of several, or what a regression is to give.
    second: str | None = None


@dataclass(frozen=True)
class Tagged:
    """A text in words, with a tag (name or number) for each."""

    words: list[str]
    tags: list[object]


Document: TypeAlias = Text | Example | Chat | Labelled | Tagged


@dataclass(frozen=True)
class LoadedData:
    """The documents of one source, in the source's order."""

    name: str  #: The source as the user gave it.
    documents: Sequence[Document]
    kind: Kind  #: The kind of every document in `documents`.
    origin: str = ""  #: Description of the data where `name` does not say it all: repository, split, a stated limit.
