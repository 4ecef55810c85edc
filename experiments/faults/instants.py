"""Small runs that are stopped at a random instant, by KILL, TERM, INT or HUP, and the same run after that.

    python experiments/faults/instants.py [--count 1000] [--output reports/faults/instants.json]

`every_fault.py` stops at events of the file system; here it may be anywhere: in an import, in the linear algebra, while
cleaning up. The old result or the new one is there, whole; the next run gives the same bytes and leaves nothing.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from fault_injection import (
    CODES,
    SIGNALS,
    Ended,
    Trial,
    leave_out_what_takes_long,
    place_for_faults,
    run,
    scenarios,
    warm,
)
from outcomes import FINE, Outcome, of_problems, options, try_all
from tiny_checkpoints import saved_model, text_file

import layer_surgery


@dataclass(frozen=True)
class Stopped(Trial):
    """A scenario whose first run gets a signal after some time."""

    seconds: float = 0.0  #: Of a run that nothing stops.

    def codes(self, fault: str) -> tuple[int | None, ...]:
        """Return the exit codes that a run may have: 0 if it ended before the signal came."""
        return *CODES[fault], 0

    def run_with(self, fault: str, at: int) -> Ended:
        """Run the command with a signal at `at` thousandths of the time that it takes."""
        pause = self.seconds * at / 1000

        def watch(_log: int) -> None:
            def send() -> None:
                time.sleep(pause)
                os.kill(os.getpid(), SIGNALS[fault])

            leave_out_what_takes_long()
            threading.Thread(target=send, daemon=True).start()

        return run(self.scenario.command, self.folder, watch=watch)

    def next_run(self) -> Ended:
        return run(self.scenario.again, self.folder, watch=quick)


def quick(_log: int) -> None:
    """Leave out the same in the runs that nothing stops."""
    leave_out_what_takes_long()


def main() -> None:
    given = options(__doc__, 1000).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=place_for_faults()) as name:
        folder = Path(name)
        model, text = saved_model(folder / "model"), text_file(folder / "text.txt")
        warm(model, text)
        layer_surgery.compress(model, folder / "low-rank", layers=[1], keep=0.3, method="svd", eval_data=None)
        kinds: dict[str, Callable[[int], Outcome | None]] = {}
        for scenario in scenarios(model, folder / "low-rank", text):
            trial = Stopped.begin(scenario, folder / scenario.name, quick)
            begun = time.monotonic()
            trial.next_run()
            trial = replace(trial, seconds=time.monotonic() - begun)

            def attempt(number: int, trial: Stopped = trial) -> Outcome | None:
                draw = random.Random(f"{trial.scenario.name} {number}")
                fault, at = draw.choice(sorted(SIGNALS)), draw.randrange(1000)
                problems = list(trial.problems(fault, at))
                return of_problems(problems) if problems else (FINE, "")

            kinds[scenario.name] = attempt
        try_all("runs stopped at random instants", kinds, given, at_once=10)


if __name__ == "__main__":
    main()
