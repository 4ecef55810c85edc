"""Healing in several processes: as one process does it, and an end of all when one fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from healing_processes import RESUMED, healed, with_both_models
from safetensors.torch import load_file
from tiny_checkpoints import finished, saved_model, text_file
from torch import Tensor

import layer_surgery
from layer_surgery.records import HealingRecord
from layer_surgery.records.reading import read_report

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "healing_processes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have made, and one."""
    folder = tmp_path_factory.mktemp("healing")
    text = text_file(folder / "text.txt")
    model = saved_model(folder / "model", "llama")
    cut = {"layers": [1, 2], "keep": 0.3, "method": "svd", "samples": 8, "sequence_length": 12, "continuations": 0}
    layer_surgery.compress(model, folder / "smaller", calibration=str(text), eval_data=None, **cut)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = finished([*launcher, str(SCRIPT), str(folder)], folder, timeout=500)
    assert done.code == 0, done.err[-3000:]
    healed(folder, "whole")
    with_both_models(folder)
    return folder


def record(directory: Path) -> HealingRecord:
    found = read_report(directory / "surgery.json").healing
    assert found is not None
    return found


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize(("name", "steps"), [("whole", [0, 3, 6]), ("both", [0, 1, 2])])
def test_the_loss_of_each_step_is_that_of_one_process(folder: Path, name: str, steps: list[int]) -> None:
    one, two = (record(folder / f"{name} by {count}") for count in (1, 2))
    assert [point.step for point in two.curve] == [point.step for point in one.curve] == steps
    assert [point.tokens for point in two.curve] == [point.tokens for point in one.curve]
    for alone, together in zip(one.curve, two.curve, strict=True):
        assert together.losses.keys() == alone.losses.keys()
        assert together.losses == pytest.approx(alone.losses, abs=1e-6)
        assert together.validation == pytest.approx(alone.validation, abs=1e-6)
    if name != "whole":
        return
    expected, found, before = (
        weights(folder / f"checkpoints of whole by {count}" / step)
        for count, step in ((1, "checkpoint-6"), (2, "checkpoint-6"), (2, "begin"))
    )
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5
    assert max(float((found[name] - before[name]).abs().max()) for name in expected) > 1e-3


def test_the_answers_of_the_original_are_kept_in_the_same_bytes(folder: Path) -> None:
    one, two = (
        {path.relative_to(cache): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}
        for cache in (folder / "cache by 1", folder / "cache by 2")
    )
    (of_whole,) = {path.parent for path in one}
    assert one == {path: content for path, content in two.items() if path.parent == of_whole}


def test_a_resumed_training_ends_with_the_same_weights(folder: Path) -> None:
    whole, resumed = (folder / f"checkpoints of {name} by 2" for name in ("whole", "resumed"))
    assert not (resumed / f"checkpoint-{RESUMED}").exists()
    expected, found = (weights(path / "checkpoint-6") for path in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_loss_that_is_not_finite_in_one_process_ends_the_training_in_all(folder: Path) -> None:
    first, second = json.loads((folder / "said.json").read_text(encoding="utf-8"))
    assert first == second == ["on purpose, in step 3", 2]


def test_processes_agree_on_what_depends_on_time(folder: Path) -> None:
    found = record(folder / "probed by 2")
    assert found.steps >= 1 and found.train == "lora" and found.learning_rate in {p.learning_rate for p in found.probe}
