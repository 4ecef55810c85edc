"""Healing of other heads than that of a causal language model: the loss of a step, validation, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_encoders import labelled_tokens, own_loss, tiny_encoder
from tiny_models import streamed
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, logsigmoid

from layer_surgery.data.objective import NO_LABEL, Objective, Problem
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import DataError, UserError
from layer_surgery.healing.capture import TeacherStatesStore, asked
from layer_surgery.healing.mixture import parse_losses
from layer_surgery.healing.outputs import check_losses
from layer_surgery.healing.student import Student
from layer_surgery.healing.teacher.cache import TeacherIdentity
from layer_surgery.healing.teacher.rows import TeacherRows, captured_rows, stored_rows
from layer_surgery.healing.windows import WindowDataset, healing_data
from layer_surgery.walk.boundaries import BoundaryStore
from layer_surgery.walk.walk import WalkSettings

LAYERS = 2
CASES: list[tuple[Problem, str]] = [
    ("masked_token", "bert"),
    ("tags", "modernbert"),
    ("single_label", "roberta"),
    ("single_label", "llama"),
    ("multi_label", "deberta-v2"),
    ("regression", "distilbert"),
]


def model(problem: Problem, model_type: str, seed: int) -> Any:
    return tiny_encoder(model_type, problem, layers=LAYERS, seed=seed).requires_grad_(False)


def teacher_rows(teacher: Any, tokens: PackedTokens) -> TeacherRows:
    every = slice(0, tokens.sequences)
    found = asked(streamed(teacher), tokens, WalkSettings(batch_size=2), every, lambda outputs, _window: [outputs])
    identity = TeacherIdentity(teacher_sha256="", tokenizer_sha256="", data_sha256="")
    rows = captured_rows((piece for _, (piece,) in found), None, identity)
    return TeacherRows(rows, tokens.loss_mask.sum(dim=1).tolist(), tokens.objective)


def student(problem: Problem, model_type: str, tokens: PackedTokens, losses: tuple[str, ...], **more: Any) -> Student:
    made = Student(
        streamed(model(problem, model_type, seed=1), resident_bytes=0),
        parse_losses(losses),
        teacher_rows(model(problem, model_type, seed=2), tokens),
        **more,
    )
    made.unfreeze({name for name, _ in made.model.named_parameters()})
    return made


def divergence(teacher: Tensor, outputs: Tensor, tokens: PackedTokens) -> Tensor:
    """Return the mean over items, from the outputs of two whole models, by definition."""
    problem, labels = tokens.objective.problem, tokens.labels
    assert labels is not None
    if problem == "regression":
        return (outputs - teacher).square().mean() / 2
    if problem == "multi_label":
        yes = teacher.sigmoid()
        of_yes = yes * (logsigmoid(teacher) - logsigmoid(outputs))
        of_no = (1 - yes) * (logsigmoid(-teacher) - logsigmoid(-outputs))
        return (of_yes + of_no).mean()
    if problem != "single_label":
        teacher, outputs = teacher[labels != NO_LABEL], outputs[labels != NO_LABEL]
    return kl_div(outputs.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")


@pytest.mark.parametrize(("problem", "model_type"), CASES)
def test_the_loss_and_its_gradient_are_those_of_the_whole_model(problem: Problem, model_type: str) -> None:
    tokens = labelled_tokens(problem)
    made = student(problem, model_type, tokens, ("kl:1", "ce:0.5"))
    batch = WindowDataset(tokens, torch.arange(5)).collate(range(5))
    found = made(**batch)["loss"]
    found.backward()
    gradient = {name: value.grad.clone() for name, value in made.model.named_parameters() if value.grad is not None}
    made.zero_grad()
    inputs = tokens.inputs(slice(0, 5))
    with torch.no_grad():
        teacher = model(problem, model_type, seed=2)(**inputs).logits
    ce = own_loss(made.model, tokens) / (2 if problem == "regression" else 1)
    expected = divergence(teacher, made.model(**inputs).logits, tokens) + 0.5 * ce
    assert float((found - expected).detach().abs()) < 1e-7
    expected.backward()
    wanted = {name: value.grad for name, value in made.model.named_parameters() if value.grad is not None}
    assert wanted and all(
        float((gradient.get(name, torch.zeros_like(value)) - value).abs().max()) < 1e-7
        for name, value in wanted.items()
    )


@pytest.mark.parametrize(("problem", "model_type"), [CASES[0], CASES[3], CASES[4]])
def test_the_gradient_of_a_step_is_the_same_for_every_micro_batch(
    problem: Problem, model_type: str, tmp_path: Path
) -> None:
    tokens = labelled_tokens(problem, n=6)
    collate = WindowDataset(tokens, torch.arange(6)).collate
    labels = collate(range(6))["labels"]
    counted = (labels != NO_LABEL).sum()  # as Trainer counts

    def gradient(size: int) -> dict[str, Tensor]:
        teacher = streamed(model(problem, model_type, seed=2))
        shape = (tokens.sequences, tokens.sequence_length, teacher.hidden_size)
        with BoundaryStore(shape, torch.float64, torch.device("cpu"), 1 << 24, tmp_path) as store:
            states = TeacherStatesStore(store, list(range(LAYERS)))
            for _ in asked(teacher, tokens, WalkSettings(batch_size=4), slice(0, 6), stores=[states]):
                pass
            pairs = [(layer, layer) for layer in range(LAYERS)]
            made = student(problem, model_type, tokens, ("kl:1", "hidden:1", "cka:1"), states=states, pairs=pairs)
            for start in range(0, 6, size):
                made(**collate(range(start, start + size)), num_items_in_batch=counted)["loss"].backward()
        return {name: value.grad for name, value in made.model.named_parameters() if value.grad is not None}

    whole = gradient(6)
    for size in (1, 2):
        parts = gradient(size)
        assert parts.keys() == whole.keys()
        assert max(float((parts[name] - whole[name]).abs().max()) for name in whole) < 1e-9


@pytest.mark.parametrize(("problem", "model_type"), CASES)
def test_validation_is_the_loss_that_the_model_computes_itself(problem: Problem, model_type: str) -> None:
    tokens = labelled_tokens(problem)
    made = student(problem, model_type, tokens, ("ce",))
    assert made.measure("validation", tokens, 2) == pytest.approx(
        float(own_loss(made.model, tokens).detach()), rel=1e-6
    )


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "skew_kl", "jsd", "dkd"])
def test_a_student_has_nothing_to_learn_from_itself(loss: str) -> None:
    problem: Problem = "single_label" if loss == "dkd" else "multi_label"
    tokens = labelled_tokens(problem)
    made = student(problem, "bert", tokens, (loss,))
    made.outputs = teacher_rows(made.model, tokens)
    found = made(**WindowDataset(tokens, torch.arange(5)).collate(range(5)))["loss"]
    found.backward()
    assert abs(float(found.detach())) < 1e-9
    assert all(float(value.grad.abs().max()) < 1e-6 for value in made.parameters() if value.grad is not None)


def test_several_labels_are_learnt_each_by_itself() -> None:
    tokens = labelled_tokens("multi_label")
    made = student("multi_label", "bert", tokens, ("ce:1",))
    outputs = made.model(**tokens.inputs(slice(0, 5))).logits
    found = made(**WindowDataset(tokens, torch.arange(5)).collate(range(5)))["loss"]
    assert float((found - binary_cross_entropy_with_logits(outputs, tokens.labels.double())).detach().abs()) < 1e-9  # type: ignore[union-attr]


def test_outputs_are_kept_and_found_again(tmp_path: Path) -> None:
    identity = TeacherIdentity(teacher_sha256="a", tokenizer_sha256="b", data_sha256="c")
    file, said = tmp_path / "kept" / "outputs.safetensors", list[str]()
    pieces = [torch.randn(count, 3) for count in (2, 0, 1)]
    rows = captured_rows(pieces, file, identity)
    found = stored_rows(file, identity, [2, 0, 1], said.append)
    assert found is not None and torch.equal(found, rows) and not said
    objective = Objective(problem="tags", labels=("a", "b", "c"))
    read = TeacherRows(found, [2, 0, 1], objective).read(torch.tensor([2, 0]))
    assert torch.equal(read.log_probs, torch.cat([pieces[2], pieces[0]]).log_softmax(-1))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert stored_rows(file, identity, [2, 0, 1], said.append) is None
    assert "is damaged" in said[0]
    other = TeacherIdentity(teacher_sha256="other", tokenizer_sha256="b", data_sha256="c")
    captured_rows(pieces, file, identity)
    assert stored_rows(file, other, [2, 0, 1], said.append) is None
    save_file({"rows": rows.bfloat16()}, file, {"identity": "x", "sha256": "y"})  # numpy has no such numbers
    assert stored_rows(file, identity, [2, 0, 1], said.append) is None
    file.unlink()
    os.mkfifo(file)
    assert stored_rows(file, identity, [2, 0, 1], said.append) is None and len(said) == 4


@pytest.mark.parametrize(
    ("problem", "loss", "said"),
    [
        ("regression", "tvd", "the model gives numbers"),
        ("regression", "kl:1:temperature=2", "with temperature"),
        ("multi_label", "clkd", "decides on each by itself"),
    ],
)
def test_losses_that_a_head_does_not_allow_are_refused(problem: Problem, loss: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_losses(parse_losses([loss]), Objective(problem=problem, labels=("a",)))
    check_losses(parse_losses(["kl", "ce", "hidden"]), Objective(problem=problem, labels=("a",)))


def test_more_examples_are_held_out_than_windows_and_too_few_are_refused() -> None:
    examples = healing_data(labelled_tokens("single_label", n=800), None, 0.0, seed=0)
    assert examples.validation.sequences == 100
    assert len(examples.train.labels) == 700  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has 15 examples, too few"):
        healing_data(labelled_tokens("single_label", n=15), None, 0.0, seed=0)
