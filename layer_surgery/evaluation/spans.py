"""Spans in sequences of tags: where each begins and ends, and of which kind it is.

Tags are IOB or IOBES: `B-X` and `S-X` begin a span of kind X, `I-X` and `E-X` go on with one, and begin one where there
is none of this kind to go on with, as CoNLL's own script has it (Tjong Kim Sang and De Meulder, CoNLL-2003).
"""

from collections.abc import Sequence

_BEGIN, _END = frozenset("BS"), frozenset("ES")


def is_span_tagging(labels: Sequence[str]) -> bool:
    """Return whether labels are tags of spans: all but `O` are a letter of B I E S, a dash and a kind."""
    kinds = [label for label in labels if label != "O"]
    return bool(kinds) and all(label[:2] in ("B-", "I-", "E-", "S-") and len(label) > 2 for label in kinds)


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return (first, behind the last, kind) of every span."""
    found: set[tuple[int, int, str]] = set()
    start, kind = 0, ""
    for position, tag in enumerate([*tags, "O"]):
        letter, _, new = tag.partition("-")
        if kind and (new != kind or letter in _BEGIN):
            found.add((start, position, kind))
            kind = ""
        if new and not kind:
            start, kind = position, new
        if kind and letter in _END:
            found.add((start, position + 1, kind))
            kind = ""
    return found
