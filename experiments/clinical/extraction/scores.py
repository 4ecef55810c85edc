"""F1 of spans, strict (ends and kind are right) and overlapping (the kind is right, and a character is shared).

Counts are kept by document, so that intervals are over documents: all resamples draw the same ones for every model.
Shapes: D documents, R resamples. `seqeval_f1` is the same strict F1 by seqeval, which the report is checked with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from extraction.notes import Span
from extraction.terms import KINDS

Counts = NDArray[np.float64]  # [..., 4]: given spans that are right, given, gold spans that are found, gold
RESAMPLES, CONFIDENCE = 2000, 0.95


def counts(
    gold: Sequence[Sequence[Span]], given: Sequence[Sequence[Span]], kind: str | None = None, *, overlap: bool = False
) -> Counts:
    """Return what is counted in each document, [D, 4]; of one kind, or of all."""
    rows = []
    for right, found in zip(gold, given, strict=True):
        wanted, answered = ({s for s in spans if kind in (None, s.kind)} for spans in (right, found))
        if overlap:
            hits = sum(any(_share(span, other) for other in wanted) for span in answered)
            reached = sum(any(_share(span, other) for other in answered) for span in wanted)
        else:
            hits = reached = len(wanted & answered)
        rows.append((hits, len(answered), reached, len(wanted)))
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _share(first: Span, second: Span) -> bool:
    return first.kind == second.kind and first.start < second.end and second.start < first.end


def f1(sums: Counts) -> NDArray[np.float64]:
    """Return F1 of sums of counts, [..., 4] -> [...]; 0 where nothing is right."""
    precision, recall = (sums[..., a] / np.maximum(sums[..., a + 1], 1) for a in (0, 2))
    both = precision + recall
    result: NDArray[np.float64] = np.where(both > 0, 2 * precision * recall / np.where(both > 0, both, 1), 0.0)
    return result


def drawn(documents: int, seed: int) -> NDArray[np.float64]:
    """Return how often each document is in each resample, [R, D]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES).astype(np.float64)


def interval(values: NDArray[np.float64]) -> list[float]:
    """Return the percentile interval of a value's resamples."""
    tail = (1 - CONFIDENCE) / 2
    return [round(float(end), 4) for end in np.quantile(values, [tail, 1 - tail])]


def score(gold: Sequence[Sequence[Span]], given: Sequence[Sequence[Span]], seed: int) -> dict[str, dict]:
    """Return strict and overlap F1 of every kind and of all, with intervals over documents."""
    often = drawn(len(gold), seed)
    result: dict[str, dict] = {}
    for name, kind in [*((kind, kind) for kind in KINDS), ("all", None)]:
        result[name] = {}
        for way in ("strict", "overlap"):
            each = counts(gold, given, kind, overlap=way == "overlap")
            value = round(float(f1(each.sum(axis=0))), 4)
            result[name][way] = {"f1": value, "interval": interval(f1(often @ each))}
    return result


def difference(gold: Sequence[Sequence[Span]], before: Sequence, after: Sequence, seed: int) -> dict[str, dict]:
    """Return strict F1 of `after` less that of `before`, with the paired interval over documents."""
    often = drawn(len(gold), seed)
    result = {}
    for name, kind in [*((kind, kind) for kind in KINDS), ("all", None)]:
        old, new = (counts(gold, given, kind) for given in (before, after))
        change = float(f1(new.sum(axis=0)) - f1(old.sum(axis=0)))
        result[name] = {"change": round(change, 4), "interval": interval(f1(often @ new) - f1(often @ old))}
    return result


def seqeval_f1(gold: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> float:
    """Return strict F1 of tag sequences by seqeval."""
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2

    return float(f1_score(gold, given, mode="strict", scheme=IOB2, average="micro"))
