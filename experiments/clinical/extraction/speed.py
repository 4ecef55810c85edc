"""Documents per second, from text to spans, of models that take turns; and what 1,000 documents cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def documents_per_second(models: Mapping[str, Callable[[], object]], documents: int, repeats: int) -> dict[str, float]:
    """Return the median over `repeats` rounds, in each of which every model goes over all documents once.

    Time is that of the process, not of the clock, so that other programs on the machine do not count; torch has to run
    in one thread. One round before is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(repeats + 1):
        for name, run in models.items():
            start = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - start)
    return {name: documents / statistics.median(each) for name, each in seconds.items()}


def cost_per_thousand(per_second: float, price_per_hour: float) -> float:
    """Return what 1,000 documents cost on a machine with this price, one process after the other on one core."""
    return 1000 / per_second / 3600 * price_per_hour
