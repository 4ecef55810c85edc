"""The learning rate, chosen by trying a few for some steps each; and how long a step takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from layer_surgery import parallel
from layer_surgery.healing.trainee import Trainee
from layer_surgery.healing.training import TrainingSettings, regret, train
from layer_surgery.healing.windows import HealingData
from layer_surgery.records import ProbePoint

#: Learning rates that may be tried, from the lowest, and the likeliest, which is tried first; that of LoRA is higher,
#: as its factors begin at nothing.
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LIKELIEST, LIKELIEST_OF_LORA = 3e-4, 1e-3
#: Less than the first share of the loss is no gain after so few steps, and up to the second no harm.
_GAIN, _HARM = 3e-5, 3e-4
#: How many of them are tried at most.
MOST_RATES = 4
#: Steps with each, and the held-out windows that they are compared on.
PROBE_STEPS, PROBE_WINDOWS = 10, 16
#: The same of examples and of single texts, which say less each.
PROBE_EXAMPLES = 128


@dataclass(frozen=True)
class Probe:
    """Outcome of a probe."""

    points: list[ProbePoint]
    best: float  #: The learning rate with the lowest loss, if any lowers it.
    seconds_per_step: float


def probe(
    student: Trainee,
    data: HealingData,
    settings: TrainingSettings,
    rates: Sequence[float] = LEARNING_RATES,
    likeliest: float = LIKELIEST,
    advance: Callable[[], None] = lambda: None,
) -> Probe:
    """Train a student for a few steps with some learning rates, from the same weights and on the same windows.

    The student has its own weights again at the end. After `settings.seconds` no further rate is begun.

    Args:
        rates: from the lowest; which of them are tried, `downhill` says.
        likeliest: the one that is tried first.
        advance: called after each step.
    """
    compared = slice(0, PROBE_EXAMPLES if data.validation.objective.apart else PROBE_WINDOWS)
    validation = data.validation.select(compared)
    watched = data.watched.select(compared) if data.watched is not None else None
    few = replace(data, validation=validation, watched=watched)
    unhealed = {name: student.measure(name, text, settings.batch_size) for name, text in few.texts.items()}
    begun = student.save(settings.directory / "probe-begin")
    points: list[ProbePoint] = []
    seconds, began, limit = 0.0, time.monotonic(), settings.seconds

    def attempt(rate: float) -> float | None:
        """Return the regret after a few steps with a rate; none if it cannot be told, or the time is up."""
        nonlocal seconds
        if points and limit is not None and parallel.from_first(lambda: time.monotonic() - began > limit):
            return None
        short = replace(
            settings,
            steps=PROBE_STEPS,
            learning_rate=rate,
            directory=settings.directory / f"probe-{len(points)}",
            validations=1,
            seconds=None,
            keep_state=False,
            report_to="none",
        )
        start = time.monotonic()
        trained = train(student, few, short, unhealed=unhealed, advance=advance)
        seconds = time.monotonic() - start
        last = regret(trained.curve[-1].validation, unhealed) if trained.stopped is None else None
        points.append(ProbePoint(learning_rate=rate, regret=last))
        student.load(begun)
        return last

    best = downhill(rates, likeliest, attempt, abs(unhealed["validation"]))
    return Probe(points, best, parallel.from_first(lambda: seconds) / PROBE_STEPS)


def downhill(
    rates: Sequence[float], first: float, attempt: Callable[[float], float | None], loss: float = 1.0
) -> float:
    """Return the best of at most `MOST_RATES` learning rates, which are tried from a first one downhill.

    A rate that made the model worse was more likely too high than too low, and one that made it better may be raised:
    so the neighbour on that side comes next, and the one on the other side if it was no better. Then it goes on the way
    that gains. Where none gains, the highest of those that do no harm is taken: the lower a rate, the less it changes,
    so the least loss would say nothing but that.

    Args:
        rates: from the lowest.
        first: the one nearest to it comes first.
        attempt: returns what a rate costs, below 0 if it gained; none if it is not to be taken.
        loss: before the training, above 0; what is a gain and what does harm is a share of it.
    """
    at = min(range(len(rates)), key=lambda number: abs(math.log(rates[number] / first)))
    found = {at: attempt(rates[at])}
    best, least = at, _cost(found[at])
    way = 1 if least < 0 else -1
    for direction in (way, -way):
        if best != at:
            break
        while len(found) < MOST_RATES and 0 <= (there := best + direction) < len(rates):
            found[there] = attempt(rates[there])
            if _cost(found[there]) >= least:
                break
            best, least = there, _cost(found[there])
    if least < -_GAIN * loss:
        return rates[best]
    harmless = [number for number, cost in found.items() if _cost(cost) <= _HARM * loss]
    return rates[max(harmless)] if harmless else rates[best] if math.isfinite(least) else rates[min(found)]


def _cost(regret: float | None) -> float:
    return math.inf if regret is None else regret
