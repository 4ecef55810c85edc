"""Stopped at any event of the file system, by any signal or error: the old result or the new one is there, whole.

A sample of faults and events, the same in every run; `experiments/faults/every_fault.py` tries all of them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fault_injection import ERRORS, FAULTS, SIGNALS, Scenario, Trial, place_for_faults, scenarios, warm
from filesystem_events import compiler
from tiny_checkpoints import saved_model, text_file

import layer_surgery

NAMES = ("fresh", "overwrite", "resume", "export", "sweep", "cache", "heal")
#: How many faults are tried in each scenario.
TRIED = 6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and forks"),
    pytest.mark.skipif(compiler() is None, reason="a C compiler is needed to count events"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used CUDA cannot be forked"),
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir=place_for_faults()))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def commands(folder: Path) -> dict[str, Scenario]:
    """The scenarios, by name; what they import is imported here, once for all forks."""
    model, text = saved_model(folder / "model"), text_file(folder / "text.txt")
    warm(model, text)
    layer_surgery.compress(model, folder / "low-rank", layers=[1], keep=0.3, method="svd", eval_data=None)
    return {scenario.name: scenario for scenario in scenarios(model, folder / "low-rank", text)}


@pytest.fixture(scope="module")
def trials(commands: dict[str, Scenario], folder: Path) -> dict[str, Trial]:
    return {name: Trial.begin(scenario, folder / name) for name, scenario in commands.items()}


@pytest.mark.parametrize("name", NAMES)
def test_whatever_stops_a_run_the_result_is_whole_and_the_next_run_puts_all_right(
    trials: dict[str, Trial], name: str
) -> None:
    trial = trials[name]
    assert len(trial.events) > 25
    shift = NAMES.index(name)
    step = len(trial.events) / TRIED
    problems = [
        problem
        for number in range(TRIED)
        for problem in trial.problems(FAULTS[(number + shift) % len(FAULTS)], int((number + shift / len(NAMES)) * step))
    ]
    assert not problems, "\n\n".join(problems)


@pytest.mark.parametrize("fault", [*SIGNALS, *ERRORS])
def test_the_moment_of_replacing_is_safe(trials: dict[str, Trial], fault: str) -> None:
    """The events around the exchange of the old result with the new one, under every fault."""
    trial = trials["overwrite"]
    exchange = max(number for number, event in enumerate(trial.events) if event.startswith("renameat2"))
    problems = [problem for at in (exchange, exchange + 1) for problem in trial.problems(fault, at)]
    assert not problems, "\n\n".join(problems)
