"""Stop small runs at the events of the file system, by every signal and error, and check what is there then.

    python experiments/faults/every_fault.py [--kind SCENARIO]... [--output reports/faults/every_fault.json]

Events are what changes files, in Python or in a library: a file opened for writing, a write, a rename, a removal, a new
directory, an fsync. Of events that are the same but for a number (the writes to one file, the same file of each layer)
the first and the last are tried. `tests/faults/` tries a sample.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from fault_injection import ERRORS, FAULTS, SIGNALS, Trial, place_for_faults, scenarios, warm
from outcomes import FINE, Outcome, of_problems, options, try_all
from tiny_checkpoints import saved_model, text_file

import layer_surgery


def in_order(events: list[int], draw: random.Random) -> list[tuple[str, int]]:
    """Return every fault at every event: first KILL, another signal and an error at each event, then the rest.

    Both are shuffled, so that a part of them is a sample of all.
    """
    signals, errors = sorted({*SIGNALS} - {"KILL"}), sorted(ERRORS)
    first = [
        (fault, at)
        for number, at in enumerate(events)
        for fault in ("KILL", signals[number % len(signals)], errors[number // len(signals) % len(errors)])
    ]
    rest = [(fault, at) for fault in FAULTS for at in events if (fault, at) not in first]
    draw.shuffle(first)
    draw.shuffle(rest)
    return [*first, *rest]


def main() -> None:
    given = options(__doc__, None).parse_args()
    torch.set_num_threads(1)  # forks have no other threads
    with tempfile.TemporaryDirectory(dir=place_for_faults()) as name:
        folder = Path(name)
        model, text = saved_model(folder / "model"), text_file(folder / "text.txt")
        warm(model, text)
        layer_surgery.compress(model, folder / "low-rank", layers=[1], keep=0.3, method="svd", eval_data=None)
        kinds: dict[str, Callable[[int], Outcome | None]] = {}
        counts: dict[str, int] = {}
        events: dict[str, dict[str, int]] = {}
        for scenario in scenarios(model, folder / "low-rank", text):
            trial = Trial.begin(scenario, folder / scenario.name)
            cases = in_order(trial.chosen(), random.Random(scenario.name))

            def attempt(number: int, trial: Trial = trial, cases: list[tuple[str, int]] = cases) -> Outcome:
                problems = list(trial.problems(*cases[number]))
                return of_problems(problems) if problems else (FINE, "")

            kinds[scenario.name], counts[scenario.name] = attempt, len(cases)
            events[scenario.name] = {"events": len(trial.events), "tried": len(trial.chosen()), "faults": len(FAULTS)}
            print(scenario.name, events[scenario.name], flush=True)
        try_all("runs stopped at events of the file system", kinds, given, 14, counts, {"events": events})


if __name__ == "__main__":
    main()
