"""Which points no other beats."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from layer_surgery.records import EvaluationResult
from layer_surgery.records.sweep import FRONTS, Front, SweepPoint, beats


def perplexity_ratio(before: EvaluationResult, after: EvaluationResult) -> float | None:
    """Return the geometric mean over all texts of perplexity after / before; None if one was not measured."""
    texts = before.perplexity
    if not texts or texts.keys() != after.perplexity.keys():
        return None
    return math.exp(fmean(math.log(after.perplexity[name].value / texts[name].value) for name in texts))


def loss_ratio(before: EvaluationResult, after: EvaluationResult) -> float | None:
    """Return the geometric mean over all sets of examples of the loss after / before; None if one was not measured."""
    losses = {
        name: (before.tasks[name].metrics["loss"].value, task.metrics["loss"].value)
        for name, task in after.tasks.items()
        if "loss" in task.metrics and name in before.tasks
    }
    if not losses or min(map(min, losses.values())) <= 0:
        return None
    return math.exp(fmean(math.log(new / old) for old, new in losses.values()))


def mean_loss(after: EvaluationResult) -> float | None:
    """Return the mean over all sets of texts of an embedding model's loss; None if none was measured."""
    losses = [task.metrics["loss"].value for task in after.tasks.values() if "loss" in task.metrics]
    return fmean(losses) if losses else None


def with_fronts(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Return the points with the Pareto fronts that each is on, by `perplexity_ratio` or what is in its place.

    The fronts of speed are those of the models together with the original, which has the ratios 1 (and the embedding
    loss 0): a model that is neither better nor faster than it is on none.
    """
    fronts: dict[int, list[Front]] = {number: [] for number in range(len(points))}
    for front in FRONTS:
        known = [
            (number, *values)
            for number, point in enumerate(points)
            if (values := _coordinates(point, front)) is not None
        ]
        itself = 0.0 if any(point.embedding_loss is not None for point in points) else 1.0
        rivals = [(quality, cost) for _, quality, cost in known] + [(itself, -1.0)] * (front != "parameters")
        for number, quality, cost in known:
            if not any(beats(rival, (quality, cost)) for rival in rivals):
                fronts[number].append(front)
    return [replace(point, fronts=fronts[number]) for number, point in enumerate(points)]


def _coordinates(point: SweepPoint, front: Front) -> tuple[float, float] | None:
    """Return quality and cost, both the better the smaller."""
    value: float | None = getattr(point, front)
    qualities = (point.perplexity_ratio, point.loss_ratio, point.embedding_loss)
    quality = next((each for each in qualities if each is not None), None)
    if point.status == "failed" or quality is None or value is None:
        return None
    return quality, value if front == "parameters" else -value
