"""Spans as tags of words (IOB2) and back, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from extraction.notes import Span
from extraction.terms import KINDS

TAGS = ("O", *(f"{letter}-{kind}" for kind in KINDS for letter in "BI"))
_WORD = re.compile(r"\w+|[^\w\s]")


class LabelError(ValueError):
    """Labels that no tagger can learn from, or that do not fit their text."""


def words_of(text: str) -> list[tuple[int, int]]:
    """Return where the words of a text begin and end: runs of letters and digits, and every other sign by itself."""
    return [match.span() for match in _WORD.finditer(text)]


def check_spans(text: str, spans: Sequence[Span], at: str) -> None:
    """Raise `LabelError` for a span that is empty or not within the text, or of a kind that the tagger has not."""
    for span in spans:
        if not 0 <= span.start < span.end <= len(text):
            raise LabelError(
                f"{at}: the span [{span.start}, {span.end}) does not lie within the text of {len(text)} characters; "
                "give offsets of characters, with the end behind the start."
            )
        if span.kind not in KINDS:
            raise LabelError(f"{at}: the kind '{span.kind}' is none of {', '.join(KINDS)}; use one of these.")


def check_classes(labels: Sequence[Sequence[Span]], at: str) -> None:
    """Raise `LabelError` if there is a kind without a single span: a tagger would learn never to give it."""
    present = {span.kind for spans in labels for span in spans}
    missing = [kind for kind in KINDS if kind not in present]
    if missing:
        raise LabelError(
            f"{at}: no note has a span of the kind {', '.join(missing)}; add notes that have, or a labeller."
        )


def tags_of(text: str, spans: Sequence[Span], at: str = "note") -> list[str]:
    """Return the tag of each word; a word that a span holds a part of belongs to it, and to the first if to several."""
    check_spans(text, spans, at)
    tags = []
    before: Span | None = None
    for start, end in words_of(text):
        span = next((each for each in sorted(spans) if each.start < end and start < each.end), None)
        tags.append("O" if span is None else f"{'I' if span is before else 'B'}-{span.kind}")
        before = span
    return tags


def spans_of(text: str, tags: Sequence[str]) -> list[Span]:
    """Return the spans that tags of words say, from the first character of their first word to the last of their last.

    `I-X` goes on with a span of kind X, and begins one where there is none to go on with.
    """
    found: list[Span] = []
    going_on = False
    for (start, end), tag in zip(words_of(text), tags, strict=True):
        letter, _, kind = tag.partition("-")
        if kind and letter == "I" and going_on and found[-1].kind == kind:
            found[-1] = Span(found[-1].start, end, kind)
        elif kind:
            found.append(Span(start, end, kind))
        going_on = bool(kind)
    return found


def write_tagged(path: Path, texts: Sequence[str], labels: Sequence[Sequence[Span]]) -> None:
    """Write rows of `tokens` and `tags`, as `layer_surgery` and `datasets` read them."""
    rows = [
        {"tokens": [text[a:b] for a, b in words_of(text)], "tags": tags_of(text, spans, f"{path.name}, note {number}")}
        for number, (text, spans) in enumerate(zip(texts, labels, strict=True), start=1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
