"""The loss of embedding models, and that the moments of its probes are its second derivative."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_embedders import dense, saved_embedder, text_tokens
from tiny_models import settings, streamed
from torch import Tensor

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.evaluation.vectors import text_vectors
from layer_surgery.walk.embedding import (
    COSINE,
    SIMILARITY,
    curvature_probes,
    embedding_losses,
    probe_generator,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_is_its_definition() -> None:
    vectors, teacher = random(5, 4), random(5, 4, seed=1)
    s, t = vectors / vectors.norm(dim=1, keepdim=True), teacher / teacher.norm(dim=1, keepdim=True)
    found = embedding_losses(3 * vectors, 0.5 * teacher)  # lengths count for nothing
    for i in range(5):
        pairs = sum(float(s[i] @ s[j] - t[i] @ t[j]) ** 2 for j in range(5)) / 5
        assert float(found[i]) == pytest.approx(COSINE * (1 - float(s[i] @ t[i])) + SIMILARITY * pairs, rel=1e-12)
    assert float(embedding_losses(vectors, vectors).abs().max()) == 0


@pytest.mark.parametrize("turn", [False, True])
def test_the_mean_square_of_the_probes_is_twice_the_rise_of_the_loss(turn: bool) -> None:
    """Against a finite difference of the loss itself; also for a rotation, which no similarity sees."""
    vectors = random(6, 3)
    change = random(6, 3, seed=1)
    if turn:
        skew = random(3, 3, seed=2)
        change = vectors @ (skew - skew.T)
    step = 1e-5
    rise = float(embedding_losses(vectors + step * change, vectors).sum()) / step**2
    generator = torch.Generator().manual_seed(0)
    squares = torch.stack([(curvature_probes(vectors, generator) * change).sum() ** 2 for _ in range(8000)])
    error = float(squares.std()) / len(squares) ** 0.5
    assert abs(float(squares.mean()) - 2 * rise) < 4 * error
    assert error < 0.05 * rise


def test_probes_of_a_model_tell_what_a_change_of_its_weights_costs(tmp_path: Path) -> None:
    """The way from a weight to the loss, in float64: what the vectors do, and what of that the probes see."""
    path = saved_embedder(
        tmp_path / "model",
        layers=2,
        pooling="mean_sqrt_len_tokens",
        others=(dense(32, 12, activation="activation.Tanh"),),
        dtype=torch.float64,
    )
    model = streamed(path)
    tokens = text_tokens(model.checkpoint.objective)
    vectors = text_vectors(model, tokens, settings(tmp_path))
    name, step = "intermediate.dense.weight", 1e-5
    with model.layer(1) as layer:
        change = random(*layer.get_parameter(name).shape, seed=5)
    moved = _vectors_with(path, name, step * change, tokens, tmp_path)
    rise = float(embedding_losses(moved, vectors).sum()) / step**2
    generator = torch.Generator().manual_seed(1)
    direction = (moved - vectors) / step
    squares = torch.stack([(curvature_probes(vectors, generator) * direction).sum() ** 2 for _ in range(4000)])
    assert float(squares.mean()) == pytest.approx(2 * rise, rel=0.1)


def _vectors_with(path: Path, name: str, change: Tensor, tokens: PackedTokens, scratch: Path) -> Tensor:
    """Return the vectors of a model whose second layer has another weight."""
    tensors = load_file(path / "model.safetensors")
    tensors[f"encoder.layer.1.{name}"] += change
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return text_vectors(streamed(path), tokens, settings(scratch))


def test_the_same_texts_have_the_same_probes() -> None:
    vectors = random(4, 3)
    first, again = (curvature_probes(vectors, probe_generator("abc1" * 16)) for _ in range(2))
    other = curvature_probes(vectors, probe_generator("abc2" * 16))
    assert torch.equal(first, again) and not torch.equal(first, other)
