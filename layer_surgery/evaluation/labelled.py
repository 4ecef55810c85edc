"""Loss, accuracy, F1 and correlation of models with labels, each with its bootstrap interval over examples.

Every one of these is a function of sums over examples, so a resample is a choice of how often each example counts, and
all resamples are one product of matrices. Shapes: N examples (sequences), K sums, C labels, R resamples.
Method: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layer_surgery.data.objective import Objective
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.evaluation.spans import is_span_tagging, spans
from layer_surgery.evaluation.uncertainty import CONFIDENCE, RESAMPLES
from layer_surgery.records import Interval, TaskMetric, TaskResult
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Losses, Walk, WalkSettings

Array = NDArray[np.float64]
Answers = NDArray[Any]  # of tokens or sequences: numbers of labels, 0 and 1, or floats
#: Elements of the matrices of resamples that exist at a time (32 MiB).
_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Measure:
    """A quantity of a model on some examples, as a function of sums over them."""

    sums: Array  #: [N, K], what each example adds.
    value: Callable[[Array], Array]  #: [..., K] -> [...]
    higher_is_better: bool = True


@dataclass(frozen=True)
class LabelOutcome:
    """What one model does on one set of labelled examples."""

    measures: Mapping[str, Measure]
    items: int

    def result(self, seed: int) -> TaskResult:
        """Return every measure with its bootstrap standard error."""
        drawn = _resampled([measure.sums for measure in self.measures.values()], seed)
        return TaskResult(
            metrics={
                name: TaskMetric(
                    value=float(measure.value(measure.sums.sum(axis=0))),
                    stderr=float(np.nanstd(measure.value(sums), ddof=1)) if self.items > 1 else None,
                    higher_is_better=measure.higher_is_better,
                )
                for (name, measure), sums in zip(self.measures.items(), drawn, strict=True)
            },
            items=self.items,
            num_fewshot=None,
            version="",
        )


@torch.no_grad()
def label_outcome(model: StreamedModel, tokens: PackedTokens, settings: WalkSettings) -> LabelOutcome:
    """Walk over labelled examples and return what they come to; one layer of the model is in memory at a time.

    Raises `NumericalError` if the loss of any example is not finite.
    """
    with Walk(model, tokens, settings) as walk:
        last = walk.forward(range(model.layer_count), keep=False)
        losses = walk.losses(last)
        parts = [tuple(each.cpu() for each in part) for part in _answers(walk, last, tokens)]
    rows, given, wanted = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    # Windows of one document are one example: their tags are put together before spans are looked for.
    examples = np.arange(tokens.sequences) if tokens.documents is None else tokens.documents.numpy()
    count = int(examples.max()) + 1
    measures = {
        **_measures(tokens.objective, count, examples[rows], given, wanted),
        "loss": _loss(losses, count, examples),
    }
    return LabelOutcome(measures, count)


def _answers(walk: Walk, last: Boundary, tokens: PackedTokens) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield sequences, answers and labels; an answer is the number of a label, or what the head gives itself."""
    raw = tokens.objective.problem in ("multi_label", "regression")
    for rows, logits, labels in walk.predictions(last):
        yield rows, logits.float() if raw else logits.argmax(dim=-1), labels


def label_changes(before: LabelOutcome, after: LabelOutcome, seed: int) -> dict[str, Interval]:
    """Return after - before of every measure, with a paired bootstrap interval over the same examples."""
    if after.items < 2:
        return {}
    names = [name for name in after.measures if name in before.measures]
    both = [outcome.measures[name].sums for name in names for outcome in (before, after)]
    drawn = _resampled(both, seed)
    changes = {}
    for place, name in enumerate(names):
        old, new = before.measures[name], after.measures[name]
        differences = new.value(drawn[2 * place + 1]) - old.value(drawn[2 * place])
        tail = (1 - CONFIDENCE) / 2
        low, high = np.nanquantile(differences, [tail, 1 - tail])
        value = float(new.value(new.sums.sum(axis=0)) - old.value(old.sums.sum(axis=0)))
        changes[name] = Interval(
            value=value, low=float(low), high=float(high), confidence=CONFIDENCE, pairs=after.items
        )
    return changes


def _resampled(sums: Sequence[Array], seed: int) -> list[Array]:
    """Return each of these sums over the examples of every resample, [R, K]; the resamples are the same for all."""
    count = len(sums[0])
    generator = np.random.default_rng(seed)
    parts: list[list[Array]] = [[] for _ in sums]
    step = max(1, _AT_A_TIME // count)
    for start in range(0, RESAMPLES, step):
        often = generator.multinomial(count, np.full(count, 1 / count), size=min(step, RESAMPLES - start))
        for part, each in zip(parts, sums, strict=True):
            part.append(often.astype(np.float64) @ each)
    return [np.concatenate(part) for part in parts]


def _loss(losses: Losses, count: int, examples: Answers) -> Measure:
    """Return the mean loss; `examples` says of which of `count` each sequence is."""
    sums = np.zeros((count, 2))
    np.add.at(sums, examples, np.stack([losses.sums.numpy(), losses.tokens.double().numpy()], axis=1))
    return Measure(sums, _ratio, higher_is_better=False)


def _measures(objective: Objective, count: int, rows: Answers, given: Answers, wanted: Answers) -> dict[str, Measure]:
    """Return the measures of a problem; `rows` says of which of `count` examples each answer is."""
    if objective.problem == "regression":
        return {"pearson": _correlation(given, wanted), "spearman": _correlation(_ranks(given), _ranks(wanted))}
    if objective.problem == "multi_label":
        chosen, right = given > 0, wanted > 0.5
        exact = np.stack([(chosen == right).all(axis=1), np.ones(count)], axis=1)
        return {"exact_match": Measure(exact, _ratio), **_f1(chosen & right, chosen & ~right, ~chosen & right)}
    correct = np.zeros((count, 2))
    np.add.at(correct, rows, np.stack([given == wanted, np.ones(len(given))], axis=1))
    measures = {"accuracy": Measure(correct, _ratio)}
    if objective.problem == "masked_token":
        return measures
    if objective.problem == "tags" and is_span_tagging(objective.labels):
        return measures | {"span_f1": _span_f1(objective, count, rows, given, wanted)}
    return measures | {"f1_macro": _macro_f1(len(objective.labels), count, rows, given, wanted)}


def _ratio(sums: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample without any label
        ratio: Array = sums[..., 0] / sums[..., 1]
    return ratio


def _f1(hits: Answers, wrong: Answers, missed: Answers) -> dict[str, Measure]:
    """Return F1 over all labels together, and its mean over labels; hits, wrong and missed are [N, C]."""
    per_label = np.concatenate([hits, wrong, missed], axis=1).astype(np.float64)
    together = np.stack([each.sum(axis=1) for each in (hits, wrong, missed)], axis=1).astype(np.float64)
    return {"f1_micro": Measure(together, _mean_f1(np.array([True]))), "f1_macro": _macro(per_label)}


def _macro_f1(labels: int, count: int, rows: Answers, given: Answers, wanted: Answers) -> Measure:
    """Return the mean over labels of F1, counted by token or by sequence."""
    sums = np.zeros((count, 3 * labels))
    same = given == wanted
    np.add.at(sums, (rows[same], wanted[same]), 1)
    np.add.at(sums, (rows[~same], labels + given[~same]), 1)
    np.add.at(sums, (rows[~same], 2 * labels + wanted[~same]), 1)
    return _macro(sums)


def _macro(per_label: Array) -> Measure:
    """Return the mean F1 of the labels that the examples have: of others there is none."""
    hits, _, missed = np.split(per_label.sum(axis=0), 3)
    return Measure(per_label, _mean_f1(hits + missed > 0))


def _span_f1(objective: Objective, count: int, rows: Answers, given: Answers, wanted: Answers) -> Measure:
    """Return F1 of spans, all kinds together; a span is right if its ends and its kind are (as CoNLL-2003 counts)."""
    sums = np.zeros((count, 3))
    for row in np.unique(rows):
        found, right = (spans([objective.labels[k] for k in each[rows == row]]) for each in (given, wanted))
        sums[row] = len(found & right), len(found - right), len(right - found)
    return Measure(sums, _mean_f1(np.array([True])))


def _mean_f1(counted: NDArray[np.bool_]) -> Callable[[Array], Array]:
    """Return a function from hits, wrong and missed ones of each label, [..., 3 C], to the mean F1 of those counted."""

    def value(sums: Array) -> Array:
        hits, wrong, missed = (each[..., counted] for each in np.split(sums, 3, axis=-1))
        both = 2 * hits + wrong + missed
        f1: Array = np.where(both > 0, 2 * hits / np.maximum(both, 1), 0.0).mean(axis=-1)
        return f1

    return value


def _correlation(given: Answers, wanted: Answers) -> Measure:
    """Return Pearson's correlation, over all outputs of the head together; both [N, L]."""
    x, y = given - given.mean(), wanted - wanted.mean()
    sums = np.stack([each.sum(axis=1) for each in (np.ones_like(x), x, y, x * x, y * y, x * y)], axis=1)

    def value(total: Array) -> Array:
        n, sx, sy, sxx, syy, sxy = np.moveaxis(total, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt((sxx - sx * sx / n) * (syy - sy * sy / n))
            r: Array = np.where(spread > 0, (sxy - sx * sy / n) / spread, 0.0)
        return r

    return Measure(sums.astype(np.float64), value)


def _ranks(values: Answers) -> Array:
    """Return the ranks of all values, equal ones sharing theirs, in the shape of `values`.

    Resamples keep these ranks: those of the whole set.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse].reshape(values.shape), dtype=np.float64)
