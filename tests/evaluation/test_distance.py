"""KL divergence and agreement against whole models at once; a model and itself; what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import packed_tokens, settings, streamed, tiny_model, without_layers
from torch import Tensor
from transformers import PreTrainedModel

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError, DataError, NumericalError
from layer_surgery.evaluation import distance as module
from layer_surgery.evaluation.distance import FinalStates, distance, kl_divergence
from layer_surgery.evaluation.perplexity import window_losses
from layer_surgery.records import KlDivergence, Top1Agreement
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.walk import Walk

TOKENS = packed_tokens(5, 12, padding=True, excluded=0.3)


def measured(
    before: PreTrainedModel,
    after: PreTrainedModel,
    scratch: Path,
    tokens: PackedTokens = TOKENS,
    *,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 2,
    boundary_memory_bytes: int = 1 << 29,
) -> tuple[KlDivergence, Top1Agreement]:
    where = settings(scratch, batch_size=batch_size, boundary_memory_bytes=boundary_memory_bytes)
    states = []
    for model in (before, after):
        stream = streamed(model, dtype=dtype)
        last = Boundary(Walk(stream, tokens, where).new_store(), 0)
        window_losses(stream, tokens, where, keep=last)
        # Outer weights only: the layers of this one never get any.
        states.append(FinalStates(streamed(model, dtype=dtype), last))
    result = distance(states[0], states[1], tokens, where)
    for state in states:
        state.hidden.store.close()
    return result


def logits_where_counted(model: PreTrainedModel, tokens: PackedTokens) -> Tensor:
    with torch.no_grad():
        return model(tokens.token_ids, use_cache=False).logits[:, :-1][tokens.loss_mask[:, 1:]]


def by_hand(before: PreTrainedModel, after: PreTrainedModel, tokens: PackedTokens = TOKENS) -> tuple[Tensor, Tensor]:
    """Return the divergence and the agreement of every predicted token, from whole models and probabilities."""
    p, q = (logits_where_counted(model, tokens).double().softmax(-1) for model in (before, after))
    return (p * (p / q).log()).sum(-1), p.argmax(-1) == q.argmax(-1)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_model_and_itself_are_at_distance_zero_exactly(tmp_path: Path, model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    divergence, agreement = measured(model, model, tmp_path, dtype=dtype)
    assert (divergence.mean, divergence.p99_9, divergence.maximum, divergence.stderr) == (0, 0, 0, 0)
    assert (agreement.value, agreement.stderr) == (1, 0)
    assert divergence.tokens == agreement.tokens == TOKENS.predicted_tokens


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "cohere", "granite"])
def test_distance_is_that_of_whole_models(tmp_path: Path, model_type: str) -> None:
    before = tiny_model(model_type)
    after = without_layers(before, [1])
    divergences, agreements = by_hand(before, after)
    divergence, agreement = measured(before, after, tmp_path)
    assert divergence.mean == pytest.approx(float(divergences.mean()), rel=1e-6)
    assert divergence.p99_9 == pytest.approx(float(np.percentile(divergences.numpy(), 99.9)), rel=1e-5)
    assert divergence.maximum == pytest.approx(float(divergences.max()), rel=1e-6)
    assert agreement.value == pytest.approx(float(agreements.double().mean()), rel=1e-12)
    assert 0 < agreement.value < 1
    assert divergence.stderr is not None and 0 < divergence.stderr < divergence.mean


def test_the_direction_is_from_the_original(tmp_path: Path) -> None:
    before = tiny_model()
    after = without_layers(before, [1, 2])
    forward, backward = (measured(*pair, tmp_path)[0].mean for pair in ((before, after), (after, before)))
    assert abs(forward - backward) > 1e-3
    assert forward == pytest.approx(float(by_hand(before, after)[0].mean()), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_distance_does_not_depend_on_how_it_is_cut(
    tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny_model()
    after = without_layers(before, [1])
    reference = measured(before, after, tmp_path)
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", 61 * 5)  # five tokens at a time
    monkeypatch.setattr(module, "_EXACT_AT_A_TIME", 61 * 2)
    other = measured(before, after, tmp_path, batch_size=batch_size, boundary_memory_bytes=0)
    for a, b in zip(reference, other, strict=True):
        assert vars(a) == pytest.approx(vars(b), rel=1e-6)


def test_a_tiny_divergence_is_not_rounding() -> None:
    """1e-9 nats: log-softmax in float32 would be wrong by a hundred times as much."""
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(4, 5000, generator=generator)
    change = torch.zeros_like(logits)
    change[:, 7] = 1e-2
    p = logits.double().softmax(-1)
    # KL of raising one logit by d: log(1 + p (e^d - 1)) - p d
    expected = torch.log1p(p[:, 7] * np.expm1(1e-2)) - p[:, 7] * 1e-2
    result = kl_divergence(logits.double(), logits.double() + change)
    assert torch.allclose(result, expected, rtol=1e-2, atol=1e-15)
    assert float(result.max()) < 1e-6


def test_a_token_that_the_original_excludes_contributes_nothing() -> None:
    before, after = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.0, 1.0, 2.0]])
    p = torch.tensor([0.0, 1.0]).softmax(0)
    q = torch.tensor([0.0, 1.0, 2.0]).softmax(0)[:2]
    assert float(kl_divergence(before, after)) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)


def test_a_token_that_only_the_operated_model_excludes_is_infinitely_far() -> None:
    assert kl_divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, -torch.inf]])).isinf().all()


def test_a_divergence_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model, where = tiny_model(), settings(tmp_path)
    with Walk(streamed(model), TOKENS, where) as before, Walk(streamed(model), TOKENS, where) as after:
        before.boundary(0).write(slice(0, 5), torch.zeros(5, 12, 32))
        after.boundary(0).write(slice(0, 5), torch.full((5, 12, 32), torch.nan))
        states = [FinalStates(walk.model, walk.boundary(0)) for walk in (before, after)]
        with pytest.raises(NumericalError, match=f"not finite for {TOKENS.predicted_tokens} tokens"):
            distance(states[0], states[1], TOKENS, where)


def test_models_of_different_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocabulary of 61 tokens and .* 70"):
        measured(tiny_model(), tiny_model(vocab_size=70), tmp_path)


def test_text_without_a_token_to_predict_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    where = settings(tmp_path)
    tokens = packed_tokens(2, 6, excluded=1.1)
    with Walk(streamed(model), tokens, where) as walk:
        states = FinalStates(streamed(model), walk.boundary(0))
        with pytest.raises(DataError, match="no token to predict"):
            distance(states, states, tokens, where)
