"""Perplexity against transformers' own loss, its standard error against a bootstrap, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, packed_tokens, settings, streamed, tiny_checkpoint, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import DataError, NumericalError
from layer_surgery.evaluation.perplexity import summarise, window_losses
from layer_surgery.records import Perplexity
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Losses, WalkSettings


def windows(full: int = 4, s: int = 12, last: int | None = None) -> PackedTokens:
    """Full windows of text and, with `last`, one more that holds fewer tokens and padding."""
    packed = packed_tokens(full + (last is not None), s)
    if last is None:
        return packed
    valid, loss_mask = packed.valid.clone(), packed.loss_mask.clone()
    valid[-1, last:] = loss_mask[-1, last:] = False
    return replace(packed, valid=valid, loss_mask=loss_mask, token_ids=packed.token_ids.where(valid, 0))


def measured(model: StreamedModel, tokens: PackedTokens, where: WalkSettings) -> Perplexity:
    return summarise(window_losses(model, tokens, where), tokens)


def mean_losses_of_transformers(model: PreTrainedModel, tokens: PackedTokens) -> list[tuple[float, int]]:
    """Return (mean loss, predicted tokens) of each window by itself, cut to its valid tokens."""
    found = []
    for row, valid in zip(tokens.token_ids, tokens.valid, strict=True):
        ids = row[valid][None]
        with torch.no_grad():
            found.append((model(ids, labels=ids, use_cache=False).loss.item(), ids.shape[1] - 1))
    return found


@pytest.mark.parametrize("last", [None, 2, 7])
def test_perplexity_in_float32_is_exp_of_transformers_mean_loss_weighted_by_tokens(
    tmp_path: Path, last: int | None
) -> None:
    model, tokens = tiny_model(dtype=torch.float32), windows(last=last)
    losses = mean_losses_of_transformers(model, tokens)
    count = sum(n for _, n in losses)
    result = measured(streamed(model, dtype=torch.float32), tokens, settings(tmp_path))
    assert result.value == pytest.approx(math.exp(sum(loss * n for loss, n in losses) / count), rel=1e-6)
    assert result.tokens == count


@pytest.mark.parametrize("last", [None, 2, 7])
def test_perplexity_in_float64_is_exp_of_the_mean_cross_entropy(tmp_path: Path, last: int | None) -> None:
    # Own cross-entropy: transformers computes its loss in float32 whatever the dtype of the model.
    model, tokens = tiny_model(), windows(last=last)
    total, count = 0.0, 0
    for row, valid in zip(tokens.token_ids, tokens.valid, strict=True):
        ids = row[valid]
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0]
        total -= sum(float(logits[t].log_softmax(-1)[ids[t + 1]]) for t in range(len(ids) - 1))
        count += len(ids) - 1
    result = measured(streamed(model), tokens, settings(tmp_path))
    assert result.value == pytest.approx(math.exp(total / count), rel=1e-12)


def test_a_short_last_window_weighs_by_its_tokens_and_not_as_a_window(tmp_path: Path) -> None:
    model, tokens = tiny_model(dtype=torch.float32), windows(last=2)
    losses = mean_losses_of_transformers(model, tokens)
    by_window = math.exp(sum(loss for loss, _ in losses) / len(losses))
    result = measured(streamed(model, dtype=torch.float32), tokens, settings(tmp_path))
    assert abs(result.value - by_window) > 1e-3 * by_window


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_does_not_depend_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    model, tokens = tiny_model(), windows(7, last=5)
    reference = measured(streamed(model), tokens, settings(tmp_path, batch_size=2))
    result = measured(streamed(model), tokens, settings(tmp_path, batch_size=batch_size))
    assert result.value == pytest.approx(reference.value, rel=1e-12)
    assert result.stderr == pytest.approx(reference.stderr, rel=1e-10)


def test_perplexity_from_disk_equals_perplexity_in_memory(tmp_path: Path) -> None:
    path, tokens = tiny_checkpoint(tmp_path, max_shard_size="30KB"), windows(last=5)
    memory = measured(streamed(path), tokens, settings(tmp_path))
    disk = measured(streamed(path, resident_bytes=0), tokens, settings(tmp_path, boundary_memory_bytes=0))
    assert disk == memory


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule("lm_head").weight.zero_()
    result = measured(streamed(model), windows(), settings(tmp_path))
    assert result.value == pytest.approx(VOCABULARY, rel=1e-12)
    assert result.stderr == pytest.approx(0, abs=1e-9)


def test_the_result_says_what_it_was_measured_on(tmp_path: Path) -> None:
    tokens = windows(3, last=4)
    result = measured(streamed(tiny_model()), tokens, settings(tmp_path))
    assert (result.windows, result.sequence_length, result.tokens) == (4, 12, 3 * 11 + 3)
    assert result.data_sha256 == tokens.sha256


# Standard error


def synthetic(n: int = 400) -> tuple[Losses, PackedTokens]:
    """Losses of windows of different lengths, whose levels differ."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 60, (n,), generator=generator)
    level = 2.5 + 0.4 * torch.randn(n, generator=generator, dtype=torch.float64) + 0.005 * counts
    return Losses(level * counts, counts), packed_tokens(2, 60)


def bootstrap_stderr(sums: Tensor, counts: Tensor, resamples: int = 4000) -> float:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, len(sums), (resamples, len(sums)), generator=generator)
    return float(torch.exp(sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1)).std())


def jackknife_stderr(sums: Tensor, counts: Tensor) -> float:
    n = len(sums)
    without_each = torch.exp((sums.sum() - sums) / (counts.sum() - counts))
    return float(((n - 1) / n * ((without_each - without_each.mean()) ** 2).sum()).sqrt())


def test_standard_error_agrees_with_a_bootstrap_and_a_jackknife_over_windows() -> None:
    losses, tokens = synthetic()
    stderr = summarise(losses, tokens).stderr
    assert stderr == pytest.approx(bootstrap_stderr(losses.sums, losses.tokens), rel=0.04)
    assert stderr == pytest.approx(jackknife_stderr(losses.sums, losses.tokens), rel=0.01)


def test_standard_error_of_equal_windows_is_that_of_a_mean_through_exp() -> None:
    means = torch.tensor([2.0, 2.3, 1.9, 2.6, 2.2], dtype=torch.float64)
    losses = Losses(means * 10, torch.full((5,), 10))
    expected = math.exp(float(means.mean())) * float(means.std(unbiased=True)) / math.sqrt(5)
    assert summarise(losses, packed_tokens(5, 11)).stderr == pytest.approx(expected, rel=1e-12)


def test_windows_without_a_predicted_token_do_not_count() -> None:
    losses, tokens = synthetic()
    empty = torch.zeros(50, dtype=torch.int64)
    padded = Losses(torch.cat([losses.sums, empty.double()]), torch.cat([losses.tokens, empty]))
    assert summarise(padded, tokens) == summarise(losses, tokens)


def test_one_window_has_no_standard_error(tmp_path: Path) -> None:
    assert measured(streamed(tiny_model()), windows(1), settings(tmp_path)).stderr is None


# Refused


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.k_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_weight_is_named(tmp_path: Path, name: str, value: float) -> None:
    path = tiny_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors[name][1, 1] = value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=name.replace(".", r"\.")):
        measured(streamed(path), windows(), settings(tmp_path))


def test_a_non_finite_loss_is_refused_with_the_window(tmp_path: Path) -> None:
    model, tokens = tiny_model("starcoder2", dtype=torch.float32), windows(4)
    poisoned = int(tokens.token_ids[2, 3])
    others = tokens.token_ids[[0, 1, 3]].where(tokens.token_ids[[0, 1, 3]] != poisoned, 2)
    token_ids = tokens.token_ids.clone()
    token_ids[[0, 1, 3]] = others
    with torch.no_grad():  # finite weights whose sum overflows in a LayerNorm, for one token only
        model.get_submodule("model.embed_tokens").weight[poisoned] = 3e38
    tokens = replace(tokens, token_ids=token_ids)
    with pytest.raises(NumericalError, match=r"hidden states after layer 0 of .* are not finite in float32"):
        measured(streamed(model, dtype=torch.float32), tokens, settings(tmp_path))


def test_a_perplexity_too_large_to_write_down_is_refused() -> None:
    losses = Losses(torch.tensor([8000.0, 8000.0], dtype=torch.float64), torch.tensor([10, 10]))
    with pytest.raises(NumericalError, match="800 nats"):
        summarise(losses, packed_tokens(2, 11))


def test_no_token_to_predict_is_refused() -> None:
    losses = Losses(torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="'random tokens' has no token to predict"):
        summarise(losses, packed_tokens(2, 11))
