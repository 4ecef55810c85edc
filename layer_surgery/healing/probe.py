"""The learning rate, chosen by trying a few for some steps each; and how long a step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from layer_surgery import parallel
from layer_surgery.healing.trainee import Trainee
from layer_surgery.healing.training import TrainingSettings, regret, train
from layer_surgery.healing.windows import HealingData
from layer_surgery.records import ProbePoint

#: Learning rates that are tried, the likeliest first.
LEARNING_RATES = (3e-4, 1e-3, 1e-4)
#: Steps with each, and the held-out windows that they are compared on.
PROBE_STEPS, PROBE_WINDOWS = 10, 16
#: The same of examples and of single texts, which say less each.
PROBE_EXAMPLES = 128


@dataclass(frozen=True)
class Probe:
    """Outcome of a probe."""

    points: list[ProbePoint]
    best: float  #: The learning rate with the lowest loss.
    seconds_per_step: float


def probe(
    student: Trainee,
    data: HealingData,
    settings: TrainingSettings,
    rates: Sequence[float] = LEARNING_RATES,
    advance: Callable[[], None] = lambda: None,
) -> Probe:
    """Train a student for a few steps with each learning rate, from the same weights and on the same windows.

    The student has its own weights again at the end. After `settings.seconds` no further rate is begun.
    """
    compared = slice(0, PROBE_EXAMPLES if data.validation.objective.apart else PROBE_WINDOWS)
    validation = data.validation.select(compared)
    watched = data.watched.select(compared) if data.watched is not None else None
    few = replace(data, validation=validation, watched=watched)
    unhealed = {name: student.measure(name, text, settings.batch_size) for name, text in few.texts.items()}
    begun = student.save(settings.directory / "probe-begin")
    points: list[ProbePoint] = []
    seconds, began, limit = 0.0, time.monotonic(), settings.seconds
    for number, rate in enumerate(rates):
        if points and limit is not None and parallel.from_first(lambda: time.monotonic() - began > limit):
            break
        short = replace(
            settings,
            steps=PROBE_STEPS,
            learning_rate=rate,
            directory=settings.directory / f"probe-{number}",
            validations=1,
            seconds=None,
            keep_state=False,
            report_to="none",
        )
        start = time.monotonic()
        trained = train(student, few, short, unhealed=unhealed, advance=advance)
        seconds = time.monotonic() - start
        last = regret(trained.curve[-1].validation, unhealed)
        points.append(ProbePoint(learning_rate=rate, regret=last if trained.stopped is None else None))
        student.load(begun)
    regrets = {point.learning_rate: point.regret for point in points if point.regret is not None}
    best = min(regrets, key=lambda rate: regrets[rate]) if regrets else min(rates)
    return Probe(points, best, parallel.from_first(lambda: seconds) / PROBE_STEPS)
