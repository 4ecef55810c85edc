"""Points shared out over processes: each measures whole points by itself, and finds what all would find together.

One process, or several in step, give the same bits (see `parallel/sums.py`), so it does not matter who measures one.
What points have in common is still made by all in step: the calibration data and the statistics of all layers. The walk
over the original is each process's own, because a point alone looks at all tokens; rankings that are no statistics are
made by every process that asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from layer_surgery import parallel
from layer_surgery.config import SweepConfig
from layer_surgery.disk.writing import write_atomically
from layer_surgery.records.reading import validated
from layer_surgery.records.sweep import SweepPoint, SweepSettings
from layer_surgery.runs.stages import FISHER, WITH_STATISTICS
from layer_surgery.runs.sweep.grid import same_surgery


def share_out(points: Sequence[SweepSettings], config: SweepConfig) -> bool:
    """Return whether each process measures points of its own: if there is one for each, and none is timed.

    Speeds that are measured while other processes work on the same machine would mean little.
    """
    return 1 < parallel.group().world <= len(different(points)) and not config.speed


def different(points: Sequence[SweepSettings]) -> list[SweepSettings]:
    """Return the first of all points that give the same model."""
    first: dict[SweepSettings, SweepSettings] = {}
    for point in points:
        first.setdefault(same_surgery(point), point)
    return [*first.values()]


def need_statistics(points: Sequence[SweepSettings]) -> bool:
    """Return whether any of these points looks at the statistics of all layers."""
    return any(point.method in WITH_STATISTICS or point.scorer == FISHER for point in points)


@dataclass(frozen=True)
class Shares:
    """Points that processes measure by themselves, each found by the others in a folder that they share."""

    folder: Path
    points: Sequence[SweepSettings]

    def measure(self, point: Callable[[SweepSettings], SweepPoint]) -> Iterator[None]:
        """Measure this process's points, alone; yields behind each of them. All others are then there, too."""
        own = parallel.group()
        for number in range(own.rank, len(self.points), own.world):
            with parallel.alone():
                found = point(self.points[number])
            write_atomically(self._file(number), json.dumps(asdict(found)))
            yield
        parallel.barrier()

    def found(self) -> list[SweepPoint]:
        """Return the points that are there so far."""
        files = (self._file(number) for number in range(len(self.points)))
        return [
            validated(SweepPoint, json.loads(file.read_text(encoding="utf-8")), file, "start the sweep again")
            for file in files
            if file.exists()
        ]

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.json"
