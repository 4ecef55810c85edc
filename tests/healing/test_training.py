"""Training of a student: the loss of a step, resumption, and the weights that are left."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CPU, packed_tokens, streamed, tiny_model
from torch import Tensor
from transformers import TrainerControl

from layer_surgery.data.objective import NO_LABEL
from layer_surgery.errors import NumericalError, UserError
from layer_surgery.healing.losses import TeacherLogits
from layer_surgery.healing.mixture import parse_losses
from layer_surgery.healing.resuming import check_training_checkpoint
from layer_surgery.healing.student import Student
from layer_surgery.healing.training import METRIC, Patience, TrainingSettings, train
from layer_surgery.healing.windows import HealingData, WindowDataset, healing_data
from layer_surgery.walk.losses import next_tokens


class Noise:
    """A teacher with a random distribution for every token with loss."""

    def __init__(self, data: HealingData, vocabulary: int) -> None:
        labels = next_tokens(data.train, slice(None))
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(*labels.shape, vocabulary, generator=generator, dtype=torch.float64)
        self.log_probs, self.carries = noise.log_softmax(-1), labels != NO_LABEL

    def read(self, windows: Tensor) -> TeacherLogits:
        return TeacherLogits(self.log_probs[windows][self.carries[windows]])


@pytest.fixture
def data() -> HealingData:
    """Windows that carry loss on very different numbers of tokens."""
    return healing_data(packed_tokens(40, 12, padding=True, excluded=0.6), packed_tokens(16, 12, seed=3), 0.25, 0)


def new_student(data: HealingData, losses: tuple[str, ...] = ("kl",), names: tuple[str, ...] = ()) -> Student:
    model = tiny_model(layers=2, tied=True)
    student = Student(streamed(model, resident_bytes=0), parse_losses(losses), Noise(data, model.config.vocab_size))
    student.unfreeze(names or {name for name, _ in student.model.named_parameters()})
    return student


def settings(directory: Path, **changes: Any) -> TrainingSettings:
    made = TrainingSettings(
        steps=6,
        learning_rate=1e-3,
        step_sequences=8,
        batch_size=8,
        seed=0,
        directory=directory,
        device=CPU,
        dtype=torch.float32,
    )
    return replace(made, **changes)


def validation(student: Student, data: HealingData) -> dict[str, float]:
    return {name: student.measure(name, text, 8) for name, text in data.texts.items()}


def trained(student: Student, data: HealingData, how: TrainingSettings, **more: Any) -> dict[str, Tensor]:
    """Train, and return the weights that the training ended with, whichever it then left in the student."""
    unhealed = validation(student, data)
    result = train(student, data, how, unhealed=unhealed, **more)
    assert result.stopped is None
    return {name: value.detach().clone() for name, value in student.named_parameters()}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def test_the_gradient_of_a_step_is_per_token_and_the_same_for_every_micro_batch(data: HealingData) -> None:
    collate = WindowDataset(data.train, data.order).collate
    tokens = int((collate(range(8))["labels"] != NO_LABEL).sum())

    def gradient(size: int) -> dict[str, Tensor]:
        student = new_student(data, ("kl:1", "ce:0.5"))
        for start in range(0, 8, size):
            student(**collate(range(start, start + size)), num_items_in_batch=tokens)["loss"].backward()
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    whole = gradient(8)
    assert len(whole) == len(list(new_student(data).named_parameters()))
    for size in (1, 2, 4):
        assert differences(gradient(size), whole) < 1e-12


def test_the_loss_is_what_the_whole_model_gives(data: HealingData) -> None:
    student = new_student(data, ("kl:1", "ce:0.5"))
    batch = WindowDataset(data.train, data.order).collate([3, 9, 30])
    found = student(**batch)["loss"]
    logits = student.model(batch["input_ids"], use_cache=False).logits
    carries = batch["labels"] != NO_LABEL
    q = logits[carries].log_softmax(-1)
    p = student.outputs.read(batch["windows"]).log_probs  # type: ignore[union-attr]
    kl = (p.exp() * (p - q)).sum(-1)
    ce = -q.gather(1, batch["labels"][carries][:, None])[:, 0]
    expected = (kl + 0.5 * ce).mean()
    assert abs(float((found - expected).detach())) < 1e-6
    found.backward()
    gradient = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    expected.backward()
    assert differences(gradient, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}) < 1e-6


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_micro_batches_do_not_change_what_is_trained(data: HealingData, tmp_path: Path, batch_size: int) -> None:
    whole = trained(new_student(data), data, settings(tmp_path / "whole"))
    parts = trained(new_student(data), data, settings(tmp_path / "parts", batch_size=batch_size))
    assert differences(whole, {k: v.clone() for k, v in new_student(data).named_parameters()}) > 1e-4
    assert differences(parts, whole) < 1e-6


def last_weights(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    last = max(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return load_file(last / "model.safetensors")


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_training_ends_with_the_same_weights(data: HealingData, tmp_path: Path, step: int) -> None:
    unhealed = validation(new_student(data), data)
    keeping = {"keep_state": True, "batch_size": 4, "validations": 3, "steps": 7}  # 7 steps: into a second pass
    whole = train(new_student(data), data, settings(tmp_path / "whole", **keeping), unhealed=unhealed)
    student = new_student(data)
    resumed = train(
        student,
        data,
        settings(tmp_path / "resumed", **keeping),
        unhealed=unhealed,
        resume=tmp_path / "whole" / f"checkpoint-{step}",
    )
    expected = last_weights(tmp_path / "whole")
    assert differences(expected, dict(new_student(data).named_parameters())) > 1e-4
    assert differences(last_weights(tmp_path / "resumed"), expected) == 0
    assert [replace(point, seconds=0.0) for point in resumed.curve] == [
        replace(point, seconds=0.0) for point in whole.curve
    ]
    assert (resumed.best_step, resumed.steps) == (whole.best_step, 7)


def test_a_damaged_checkpoint_of_a_training_is_refused(data: HealingData, tmp_path: Path) -> None:
    """Every file of it, cut short, changed, made a pipe, and one of another training."""
    keeping = {"keep_state": True, "batch_size": 4, "validations": 2, "steps": 2}
    unhealed = validation(new_student(data), data)
    train(new_student(data), data, settings(tmp_path / "whole", **keeping), unhealed=unhealed)
    whole, copy = tmp_path / "whole" / "checkpoint-1", tmp_path / "copy"

    def refused(**other: Any) -> str:
        again = settings(tmp_path / "again", **(keeping | other))
        try:
            check_training_checkpoint(copy)
            train(new_student(data), data, again, unhealed=unhealed, resume=copy)
        except UserError as error:
            return str(error)
        return "it is gone on with"

    state = json.loads((whole / "trainer_state.json").read_text())
    changes: dict[str, list[bytes | None]] = {
        "trainer_state.json": [
            b"{",
            b"[]",
            b"[" * 100_000,
            json.dumps(state | {"global_step": "x"}).encode(),
            json.dumps(state | {"log_history": [{"eval_regret": 1}]}).encode(),
            json.dumps(state | {"no such field": 1}).encode(),
            None,
        ],
        "model.safetensors": [b"", (whole / "model.safetensors").read_bytes()[:-4], None],
        "optimizer.pt": [b"", (whole / "optimizer.pt").read_bytes()[:-100], b"cos\nsystem\n(S'true'\ntR.", None],
        "scheduler.pt": [b"x", None],
        "rng_state.pth": [b"x"],
    }
    for name, contents in changes.items():
        for content in contents:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            (copy / name).unlink()
            if content is None:
                os.mkfifo(copy / name)
            else:
                (copy / name).write_bytes(content)
            assert f"--resume {copy}" in refused(), (name, content)
    shutil.rmtree(copy)
    shutil.copytree(whole, copy)
    assert "of a training of 2 steps, and this one has 3" in refused(steps=3)


def test_a_loss_that_is_not_finite_ends_the_training_with_the_best_weights(data: HealingData, tmp_path: Path) -> None:
    student = new_student(data)
    unhealed = {name: value + 1 for name, value in validation(student, data).items()}  # so that all steps are a gain
    broken = student.layers[1]
    calls = []

    def break_later(_module: Any, _inputs: Any, output: Any) -> Any:
        calls.append(student.training)
        states = output[0] if isinstance(output, tuple) else output
        return torch.full_like(states, torch.nan) if stop(student) else None

    def stop(student: Student) -> bool:
        return any((tmp_path / "t").glob("checkpoint-3"))

    broken.register_forward_hook(break_later)
    result = train(student, data, settings(tmp_path / "t", steps=6, validations=6), unhealed=unhealed)
    assert result.stopped is not None
    assert "the loss is not finite" in result.stopped and "step 4" in result.stopped
    assert "the first states that are not finite come out of layer 1 of the student" in result.stopped
    assert result.best_step in (1, 2, 3)
    kept = {name: value.detach() for name, value in student.named_parameters()}
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())


def test_a_validation_that_is_not_finite_names_the_layer(data: HealingData) -> None:
    student = new_student(data)
    with torch.no_grad():
        next(student.layers[1].parameters())[0] = torch.nan
    with pytest.raises(NumericalError, match=r"the loss on the general text is not finite \(.* out of layer 1 of"):
        student.measure("general", data.validation, 8)


def test_the_random_state_of_the_process_is_left_alone(data: HealingData, tmp_path: Path) -> None:
    before = random.getstate(), torch.random.get_rng_state()
    trained(new_student(data), data, settings(tmp_path, steps=1))
    assert random.getstate() == before[0] and torch.equal(torch.random.get_rng_state(), before[1])


def test_without_a_gain_the_first_weights_come_back(data: HealingData, tmp_path: Path) -> None:
    student = new_student(data)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    unhealed = {name: value - 10 for name, value in validation(student, data).items()}
    result = train(student, data, settings(tmp_path), unhealed=unhealed)
    assert result.best_step is None
    assert differences(dict(student.named_parameters()), before) == 0


def test_points_without_a_gain_end_a_training_in_its_second_half_only() -> None:
    patience, control = Patience(3), TrainerControl()
    args = SimpleNamespace(metric_for_best_model=METRIC, greater_is_better=False)
    stopped = []
    for step in range(1, 20):
        state = SimpleNamespace(global_step=step, max_steps=20, best_metric=0.0)
        patience.on_evaluate(args, state, control, {METRIC: 0.1})
        stopped.append(control.should_training_stop)
    assert stopped.index(True) + 1 == 12  # the third from step 10 on
