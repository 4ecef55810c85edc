"""Several processes on one job: the same bytes as one, and an end of all when one fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from many_processes import CASES, TOKENS, options_of, sweep_options
from tiny_checkpoints import Outcome, finished, saved_model, tensors_of, text_file

from layer_surgery import api

SCRIPT = Path(__file__).parents[1] / "many_processes.py"
#: What a report says of the run and not of the result.
OF_THE_RUN = ("timings", "peak_memory_bytes", "provenance")


def launched(count: int, *arguments: str | Path, home: Path) -> Outcome:
    """Run `many_processes.py` in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return finished([*launcher, str(SCRIPT), *map(str, arguments)], home, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have made of all cases, with the models and the text."""
    folder = tmp_path_factory.mktemp("processes")
    text_file(folder / "text.txt")
    for family in {family for family, _ in CASES.values()}:
        saved_model(folder / family, family)
    done = launched(2, "compress", folder, home=folder)
    assert done.code == 0, done.err[-3000:]
    return folder


def report(directory: Path) -> dict[str, Any]:
    found = json.loads((directory / "surgery.json").read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name not in OF_THE_RUN}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_bytes_of_one(case: str, folder: Path) -> None:
    alone, together = folder / f"{case} by 1", folder / f"{case} by 2"
    api.compress(folder / CASES[case][0], **options_of(case, folder / "text.txt"), output=alone)
    expected, found = tensors_of(alone), tensors_of(together)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert report(together) == report(alone)


def test_points_that_processes_have_shared_out_are_those_of_one(folder: Path) -> None:
    def points(directory: Path) -> list[dict[str, Any]]:
        found = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))
        return [{name: value for name, value in point.items() if name != "seconds"} for point in found["points"]]

    alone, together = folder / "sweep by 1", folder / "sweep by 2"
    api.sweep(folder / "llama", output=alone, **sweep_options(folder / "text.txt"))
    assert len(points(alone)) == 6
    assert points(together) == points(alone)
    assert json.loads((folder / "measured.json").read_text(encoding="utf-8")) == [3, 2]  # five different models
    left = {path.name for path in together.iterdir()} - {path.name for path in alone.iterdir()}
    assert left == set()  # no scratch files


def test_a_sweep_of_several_processes_is_gone_on_with_by_one(folder: Path) -> None:
    options = sweep_options(folder / "text.txt")
    known = api.sweep(folder / "llama", output=folder / "sweep by 2", **options)
    more = api.sweep(folder / "llama", output=folder / "sweep by 2", **options | {"keep": [0.0, 0.3, 0.5]})
    seconds = {point.settings: point.seconds for point in more.points}
    assert len(more.points) == 9
    assert all(seconds[point.settings] == point.seconds for point in known.points)  # measured once


def test_what_processes_cannot_do_together_is_refused_in_one_sentence(folder: Path) -> None:
    refusals = json.loads((folder / "refusals.json").read_text(encoding="utf-8"))
    assert refusals["options"] == "process 1 has --seed 1, and process 0 has 0; give all the same."
    assert refusals["too many processes"] == (
        "5 calibration sequences in micro-batches of 5 are 1, too few for 2 processes; pass --batch-size 2 or less, or "
        "raise --samples, or start fewer processes."
    )
    assert refusals["local stage"] == (
        "--heal-stages local works in one process, but 2 were started; start it without a launcher."
    )
    assert refusals["steps"] == (
        "--heal-step-sequences is 7, which 2 processes cannot share evenly; take a multiple of 2."
    )
    assert "is a file or a link" in refusals["output"]
    assert refusals["release"].startswith('process 1 has torch "0.1", and process 0 has ')
    assert refusals["release"].endswith("; install the same on all machines.")
    assert refusals["text"].startswith("process 1 has other tokens of 'own")
    assert refusals["text"].endswith("; give all processes the same calibration data and tokenizer.")
    assert refusals["device"] == "--device is 'cuda', but torch sees no CUDA device; use --device cpu."


def test_a_number_that_is_not_finite_in_one_process_is_an_error_of_all(folder: Path) -> None:
    first, second = json.loads((folder / "refusals.json").read_text(encoding="utf-8"))["not finite"]
    assert first == second
    assert first.startswith("the embeddings of ")


@pytest.mark.parametrize("way", ["raises", "SIGKILL", "SIGTERM"])
def test_when_one_process_fails_all_end_with_one_sentence(way: str, model: Path, text: Path, tmp_path: Path) -> None:
    tokens = [f"--{name.replace('_', '-')}={value}" for name, value in TOKENS.items()]
    command = ["compress", model, f"--calibration={text}", "--no-eval", "--target-parameters=0.8", *tokens]
    done = launched(2, "1", way, *command, "--refit-general=0", "--output=result", home=tmp_path)
    assert done.code == 1
    (said,) = [line for line in done.error_lines if line.startswith("error: ")]
    expected = "RuntimeError: on purpose (in" if way == "raises" else "a process of this job has died or was stopped"
    assert said.startswith(f"error: {expected}")
    assert [path.name for path in tmp_path.iterdir()] == []  # neither a half-written result nor scratch files
