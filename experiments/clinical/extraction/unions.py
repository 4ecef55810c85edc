"""All unions of labellers, and the best of them on a few notes that a human has labelled (here: gold)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from extraction.notes import Note, Span
from extraction.scores import counts, f1
from extraction.terms import KINDS

Labels = Sequence[Sequence[Span]]  # of each note


def united(parts: Sequence[Sequence[Span]]) -> list[Span]:
    """Return the spans of several labellers in one; of spans that overlap, the longest stays, then the first."""
    kept: list[Span] = []
    for span in sorted({span for part in parts for span in part}, key=lambda s: (s.start - s.end, s)):
        if all(span.end <= other.start or other.end <= span.start for other in kept):
            kept.append(span)
    return sorted(kept)


def unions(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return every choice of one labeller or more, small ones first."""
    return [choice for size in range(1, len(names) + 1) for choice in combinations(names, size)]


def best_unions(labels: Mapping[str, Labels], gold: Sequence[Note]) -> tuple[dict[str, tuple[str, ...]], list[dict]]:
    """Return for each kind the union with the highest strict F1, the smallest of equal ones, and F1 of all."""
    table = []
    for choice in unions(list(labels)):
        given = [united([labels[name][place] for name in choice]) for place in range(len(gold))]
        scores = {kind: f1(counts([n.spans for n in gold], given, kind).sum(axis=0)) for kind in KINDS}
        table.append({"labellers": choice, "f1": {kind: round(float(score), 4) for kind, score in scores.items()}})
    best = {kind: max(table, key=lambda row: row["f1"][kind])["labellers"] for kind in KINDS}
    return best, table


def labelled_by(best: Mapping[str, tuple[str, ...]], labels: Mapping[str, Labels]) -> list[list[Span]]:
    """Return the labels of each note, each kind from its best union."""
    count = len(next(iter(labels.values())))
    return [
        united([[s for s in labels[name][place] if s.kind == kind] for kind in KINDS for name in best[kind]])
        for place in range(count)
    ]
