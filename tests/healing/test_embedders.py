"""Losses between embeddings: their values and gradients in a whole model, by definition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_embedders import TEXTS, dense, saved_embedder, text_tokens
from tiny_models import settings, streamed
from torch import Tensor

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError
from layer_surgery.evaluation.perplexity import window_losses
from layer_surgery.evaluation.vectors import text_vectors
from layer_surgery.healing.mixture import parse_losses
from layer_surgery.healing.student import Student
from layer_surgery.healing.windows import WindowDataset

LOSSES = ("embedding_cosine:10", "embedding_similarity:200", "embedding_relative:20")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved_embedder(tmp_path / "model", others=(dense(32, 8), {"kind": "Normalize"}))


def taught(model: Path, folder: Path, noise: float) -> PackedTokens:
    """Return the texts with the model's own vectors, and some noise, as the teacher's."""
    tokens = text_tokens(open_checkpoint(model).objective)
    vectors = text_vectors(streamed(model), tokens, settings(folder))
    vectors = vectors + noise * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    return replace(tokens, labels=vectors.float())


def student(model: Path, *losses: str) -> Student:
    made = Student(streamed(model, resident_bytes=0), parse_losses(losses or LOSSES))
    made.unfreeze({name for name, _ in made.model.named_parameters()})
    return made


def batch(tokens: PackedTokens) -> dict[str, Any]:
    return WindowDataset(tokens, torch.arange(len(TEXTS))).collate(range(len(TEXTS)))


def by_definition(s: Tensor, t: Tensor) -> Tensor:
    """Return 10 cosine + 200 similarity + 20 relative, each a mean, of vectors of length 1."""
    ours, theirs = s @ s.T, t @ t.T
    rows, columns = torch.triu_indices(len(s), len(s), offset=1)
    b, a = ours[rows, columns], theirs[rows, columns]
    terms = [
        (b[q] - b[p] + 0.015).clamp(min=0) for p in range(len(a)) for q in range(len(a)) if float(a[p]) > float(a[q])
    ]
    return 10 * (1 - (s * t).sum(1)).mean() + 200 * (ours - theirs).square().mean() + 20 * torch.stack(terms).mean()


def test_the_loss_and_its_gradient_are_those_of_the_whole_model(model: Path, tmp_path: Path) -> None:
    tokens, made = taught(model, tmp_path, noise=0.2), student(model)
    labels = tokens.labels
    assert labels is not None
    found = made(**batch(tokens), num_items_in_batch=labels.numel())["loss"]  # as Trainer counts
    found.backward()
    gradient = {name: value.grad.clone() for name, value in made.model.named_parameters() if value.grad is not None}
    made.zero_grad()
    states = made.model(**tokens.inputs(slice(None))).last_hidden_state
    embedder = open_checkpoint(model).embedder
    assert embedder is not None
    given = torch.nn.functional.normalize(embedder.modules().double()(states, tokens.valid), dim=1).double()
    expected = by_definition(given, torch.nn.functional.normalize(labels.double(), dim=1))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    expected.backward()
    largest = max(float(value.abs().max()) for value in gradient.values())
    assert largest > 1e-3
    for name, value in made.model.named_parameters():
        if value.grad is not None:
            assert float((gradient[name] - value.grad).abs().max()) < 1e-3 * largest, name
    assert set(made.sums.take()[0]) == {loss.partition(":")[0] for loss in LOSSES}


def test_a_student_has_nothing_to_learn_from_itself(model: Path, tmp_path: Path) -> None:
    made = student(model, "embedding_cosine:10", "embedding_similarity:200", "embedding_relative:20:margin=0")
    found = made(**batch(taught(model, tmp_path, noise=0.0)))["loss"]
    found.backward()
    assert abs(float(found.detach())) < 1e-5
    assert all(float(value.grad.abs().max()) < 1e-4 for value in made.parameters() if value.grad is not None)


def test_the_relative_loss_goes_on_to_separate_what_is_within_its_margin(model: Path, tmp_path: Path) -> None:
    made = student(model, "embedding_relative")
    assert float(made(**batch(taught(model, tmp_path, noise=0.0)))["loss"].detach()) > 1e-4


def test_the_teacher_may_have_more_numbers_where_only_similarities_are_compared(model: Path, tmp_path: Path) -> None:
    tokens = taught(model, tmp_path, noise=0.0)
    assert tokens.labels is not None
    wide = replace(tokens, labels=torch.cat([tokens.labels, torch.zeros_like(tokens.labels)], dim=1))
    made = student(model, "embedding_similarity")
    assert float(made(**batch(wide))["loss"].detach()) < 1e-6
    assert made.measure("validation", wide, 3) < 1e-6


def test_validation_is_what_a_walk_measures(model: Path, tmp_path: Path) -> None:
    tokens = taught(model, tmp_path, noise=0.2)
    found = student(model).measure("validation", tokens, 3)
    expected = window_losses(streamed(model), tokens, settings(tmp_path)).mean
    assert found == pytest.approx(expected, rel=1e-5) and expected > 0.1


def test_a_vector_without_a_direction_ends_a_training(model: Path, tmp_path: Path) -> None:
    made = student(model)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(NumericalError, match="come out of layer 0"):
        made(**batch(taught(model, tmp_path, noise=0.0)))
