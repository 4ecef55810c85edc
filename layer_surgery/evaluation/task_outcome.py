"""What a model has got on tasks, whichever library has run them, and two such results beside each other."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from layer_surgery.evaluation.correlations import Correlated, correlation_change
from layer_surgery.evaluation.uncertainty import paired_difference
from layer_surgery.records import Interval, TaskResult


@dataclass(frozen=True)
class TaskOutcome:
    """Results of one model on the tasks."""

    results: dict[str, TaskResult]
    items: dict[str, dict[str, NDArray[np.float64]]]
    """By task and metric, the value of every item, [N]; only for metrics that are means over items."""
    correlated: dict[str, dict[str, Correlated]] = field(default_factory=dict)
    """The same for metrics that are correlations with right values."""


def paired_tasks(before: TaskOutcome, after: TaskOutcome, seed: int) -> dict[str, dict[str, Interval]]:
    """Return the difference (after - before) of every metric of which the items are known, with its interval."""
    changes = {
        name: {
            metric: paired_difference(values - before.items[name][metric], None, seed)
            for metric, values in metrics.items()
            if metric in before.items.get(name, {}) and len(values) > 1
        }
        for name, metrics in after.items.items()
    }
    for name, correlations in after.correlated.items():
        for metric, values in correlations.items():
            old = before.correlated.get(name, {}).get(metric)
            change = correlation_change(old, values, seed) if old is not None else None
            if change is not None:
                changes.setdefault(name, {})[metric] = change
    return changes
