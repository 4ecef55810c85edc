"""A run that is killed at a layer goes on from the last finished one and gives the same bytes.

A sample of the steps; `experiments/faults/resume.py` kills at many more.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from fault_injection import place_for_faults, warm
from fault_injection import run as in_fork
from resuming import Run, stopped_at
from tiny_checkpoints import CommandLine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used CUDA cannot be forked"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir=place_for_faults()))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("name", "tried"),
    [("mix", 4), ("cache", 1), ("grasp", 1), ("grasp_sequential", 1), ("replaceme", 1)],
)
def test_a_killed_run_goes_on_from_the_last_finished_layer(
    name: str, tried: int, model: Path, text: Path, folder: Path
) -> None:
    warm(model, text)
    run = Run.begin(name, model, text, folder / "run")
    assert len(run.steps) >= 4
    step = len(run.steps) / tried
    problems = [problem for number in range(tried) for problem in run.problems(int((number + 0.5) * step), number)]
    assert not problems, "\n\n".join(problems)


def test_damaged_steps_are_done_again(model: Path, text: Path, folder: Path) -> None:
    run = Run.begin("fisher", model, text, folder / "run")
    for kind in ("kept-*", "passing-*", "components/*", "*.json"):
        shutil.rmtree(run.folder)
        run.folder.mkdir()
        in_fork([*run.command, "--resume", "work"], run.folder, watch=stopped_at(9))
        (statistics,) = (run.folder / "work" / "stages").glob("statistics-*")
        damaged = sorted(statistics.glob(kind))[-1]
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        ended = in_fork([*run.command, "--resume", "work"], run.folder, watch=stopped_at(None))
        assert ended.code == 0 and "are not used" in ended.said and "damaged" in ended.said, (kind, ended.said)
        assert ended.events[:2] == ["statistics-* 3", "statistics-* 2"], kind
        assert not list(run.problems(9))


def test_another_run_is_refused_and_nothing_of_others_is_removed(
    model: Path, text: Path, folder: Path, run: CommandLine
) -> None:
    killed = Run.begin("fisher", model, text, folder / "run")
    shutil.rmtree(killed.folder / "output")
    in_fork([*killed.command, "--resume", "work"], killed.folder, watch=stopped_at(9))
    work = killed.folder / "work"
    arguments = [*killed.command[:-1], str(folder / "other"), "--resume"]
    outcome = run(*[word if word != "0.3" else "0.4" for word in arguments], str(work))
    assert outcome.code == 2 and "--keep was 0.3 and is 0.4" in outcome.err, outcome.err
    assert json.loads((work / "run.json").read_text())["--keep"] == 0.3
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("x")
    outcome = run(*arguments, str(folder / "mine"))
    assert outcome.code == 2 and "thesis.txt" in outcome.err and (folder / "mine" / "thesis.txt").exists()
    outcome = run(*arguments, str(folder / "other" / "work"))
    assert outcome.code == 2 and "in one another" in outcome.err
    outcome = run(*arguments, str(text))
    assert outcome.code == 2 and "is no directory" in outcome.err


def test_a_half_written_beginning_is_its_own_and_a_folder_that_stays_fails_nothing(
    model: Path, text: Path, folder: Path, run: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = Run.begin("fisher", model, text, folder / "run")
    work = killed.folder / "work"
    for stays in (False, True):
        shutil.rmtree(killed.folder / "output")
        work.mkdir()
        (work / ".run.json.partial-0123456789abcdef").write_text("{")
        if stays:
            monkeypatch.setattr(Path, "rmdir", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        monkeypatch.chdir(killed.folder)
        outcome = run(*killed.command, "--resume", "work")
        assert outcome.code == 0, outcome.err
        assert work.exists() == stays and ("cannot be removed (No space left" in outcome.err) == stays
        if stays:
            assert os.listdir(work) == []
