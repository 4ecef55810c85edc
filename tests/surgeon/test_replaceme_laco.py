"""ReplaceMe against least squares on rows from the whole model, and LaCo against a merge by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import REFIT_TOKENS as TOKENS
from surgery_helpers import inputs_and_outputs, last_states, layer_tensors, low_rank_plan, operate, saved_result
from tiny_models import (
    decoder_layers,
    largest_difference,
    make_test_plan,
    packed_tokens,
    settings,
    streamed,
    tiny_model,
    walked_logits,
    whole_boundaries,
    without_layers,
)
from torch import Tensor
from transformers import PreTrainedModel

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.errors import DataError, PlanError
from layer_surgery.runs.bench import Result

MLP_OUT = "mlp.down_proj"


def folded(
    model: PreTrainedModel | Path, method: str, removed: list[int], scratch: Path, *, layers: int = 6, **options: Any
) -> Result:
    """Remove layers with a method that puts something into those before."""
    plan = make_test_plan(layers, removed=removed, method=method)
    options = {"tokens": TOKENS, "batch_size": 7} | options
    return operate(plan, open_checkpoint(model), scratch, **options)


def changed(model: PreTrainedModel, result: Result, index: int) -> dict[str, Tensor]:
    """Return the tensors of a layer of the original that are not as they were, by their names within it."""
    before = decoder_layers(model)[index].state_dict()
    return {n: tensor for n, tensor in layer_tensors(result, index).items() if not torch.equal(tensor, before[n])}


def best_weight(model: PreTrainedModel, first: int, after: int, scale: float = 1.0) -> Tensor:
    """Return `T^T W` with T by a tall least-squares problem over the rows of the whole model."""
    valid = TOKENS.valid
    output = inputs_and_outputs(model, first - 1, MLP_OUT, TOKENS)[1]
    states = whole_boundaries(model, TOKENS)
    mlp = scale * output[valid]
    wanted = (states[after] - (states[first] - scale * output))[valid]
    transform = torch.linalg.lstsq(mlp, wanted, driver="gelsd").solution
    return transform.T @ model.get_parameter(f"model.layers.{first - 1}.{MLP_OUT}.weight").detach()


# Runs


@pytest.mark.parametrize(
    ("removed", "runs"),
    [([], []), ([2], [(2, 3)]), ([2, 3], [(2, 4)]), ([1, 3, 4], [(1, 2), (3, 5)]), ([0, 5], [(0, 1), (5, 6)])],
)
def test_runs_of_removed_layers(removed: list[int], runs: list[tuple[int, int]]) -> None:
    assert make_test_plan(6, removed=removed).removed_runs == runs


# ReplaceMe


@pytest.mark.parametrize(("removed", "runs"), [([2], [(2, 3)]), ([4, 5], [(4, 6)]), ([1, 3, 4], [(1, 2), (3, 5)])])
def test_replaceme_equals_least_squares_on_all_rows(
    tmp_path: Path, removed: list[int], runs: list[tuple[int, int]]
) -> None:
    model = tiny_model(layers=6)
    result = folded(model, "replaceme", removed, tmp_path)
    for first, after in runs:
        tensors = changed(model, result, first - 1)
        assert tensors.keys() == {f"{MLP_OUT}.weight"}
        assert largest_difference(tensors[f"{MLP_OUT}.weight"], best_weight(model, first, after)) < 1e-5
    operated = result.checkpoint
    assert operated.low_rank == {} and operated.layer_count == 6 - len(removed)


def test_replaceme_knows_what_an_architecture_multiplies_its_mlp_with(tmp_path: Path) -> None:
    model = tiny_model("granite", layers=6)
    tensors = changed(model, folded(model, "replaceme", [2, 3], tmp_path), 1)
    expected = best_weight(model, 2, 4, scale=0.6)
    assert largest_difference(tensors[f"{MLP_OUT}.weight"], expected) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "granite", "cohere", "phi3", "falcon"])
def test_replaceme_brings_the_stream_after_the_run_nearer_than_removal(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type, layers=4)
    target, errors = last_states(open_checkpoint(model), tmp_path, TOKENS), {}
    for method in ("remove", "replaceme"):
        states = last_states(folded(model, method, [3], tmp_path, layers=4).checkpoint, tmp_path, TOKENS)
        errors[method] = float((states - target).norm())
    assert errors["replaceme"] < 0.9 * errors["remove"]


def test_replaceme_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    model = tiny_model(layers=6)
    weights = []
    for size in (1, 40):
        result = folded(model, "replaceme", [2], tmp_path, batch_size=size)
        weights.append(layer_tensors(result, 1)[f"{MLP_OUT}.weight"])
    assert largest_difference(*weights) < 1e-7


def test_replaceme_refuses_a_norm_behind_the_mlp(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"layer 1 of this gemma2 model does not \(a norm or experts.*use another method"
    ):
        folded(tiny_model("gemma2", layers=6), "replaceme", [2], tmp_path)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_replaceme_refuses_experts(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type, layers=6, dtype=torch.float32)
    with pytest.raises(PlanError, match=f"layer 1 of this {model_type} model does not"):
        folded(model, "replaceme", [2], tmp_path, dtype=torch.float32)


def test_replaceme_folds_into_a_layer_with_a_convolution_for_attention(tmp_path: Path) -> None:
    model = tiny_model("lfm2", layers=6)
    assert changed(model, folded(model, "replaceme", [2, 3], tmp_path), 1).keys() == {"feed_forward.w2.weight"}


def test_replaceme_refuses_a_bias(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="without bias"):
        folded(tiny_model("starcoder2", layers=6), "replaceme", [2], tmp_path)


def test_replaceme_refuses_a_projection_that_is_low_rank_already(tmp_path: Path) -> None:
    path = low_rank_checkpoint(tmp_path)
    with pytest.raises(PlanError, match=r"'mlp\.down_proj' of layer 1, which is low-rank already"):
        folded(path, "replaceme", [2], tmp_path, layers=4)


def test_replaceme_needs_as_many_tokens_as_the_model_is_wide(tmp_path: Path) -> None:
    plan = make_test_plan(4, removed=[2], method="replaceme")
    with pytest.raises(DataError, match="replaceme needs at least as many calibration tokens as the model is wide, 32"):
        operate(plan, open_checkpoint(tiny_model()), tmp_path / "f", tokens=packed_tokens(2, 12))


# LaCo


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "starcoder2"])
def test_laco_equals_a_merge_by_hand(tmp_path: Path, model_type: str) -> None:
    """Every linear of the layer before a run becomes itself plus the differences of the run's layers to it."""
    model = tiny_model(model_type, layers=6)
    merged = folded(model, "laco", [1, 4, 5], tmp_path).checkpoint
    tensors = merged.source.read(merged.source.specs, torch.device("cpu"))
    layers = [layer.state_dict() for layer in decoder_layers(model)]
    linears = [name for name in layers[0] if "norm" not in name]
    assert any(name.endswith("bias") for name in linears) is (model_type in ("qwen2", "starcoder2"))
    for name in layers[0]:
        expected = {0: [1], 1: [], 2: [4, 5]}  # new index: layers merged into it
        for new, (old, others) in enumerate(zip([0, 2, 3], expected.values(), strict=True)):
            weight = layers[old][name].clone()
            if name in linears:
                for other in others:
                    weight += layers[other][name] - layers[old][name]
            assert largest_difference(tensors[f"model.layers.{new}.{name}"], weight) < 1e-12, (name, new)


def test_laco_merges_weights_that_are_stored_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2 stores its linears as [in, out]."""
    model = tiny_model("gpt2", layers=4)
    result = folded(model, "laco", [2], tmp_path, layers=4)
    merged = without_layers(model, [2])
    one, two = (decoder_layers(model)[index].state_dict() for index in (1, 2))
    state = decoder_layers(merged)[1].state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if "ln_" not in name:
                tensor.copy_(one[name] + (two[name] - one[name]))
        expected = merged(TOKENS.token_ids, use_cache=False).logits
    assert largest_difference(walked_logits(streamed(result.checkpoint), TOKENS, settings(tmp_path)), expected) < 1e-9


def test_laco_looks_at_no_data(tmp_path: Path) -> None:
    from layer_surgery.surgeon import METHODS

    assert not METHODS["laco"].needs_data and METHODS["replaceme"].needs_data
    assert METHODS["laco"].removes and METHODS["replaceme"].removes


@pytest.mark.parametrize("method", ["laco", "replaceme"])
@pytest.mark.parametrize("removed", [[0], [0, 1], [0, 3]])
def test_both_need_a_layer_before_the_run(tmp_path: Path, method: str, removed: list[int]) -> None:
    with pytest.raises(PlanError, match=f"--method {method} needs a layer before each removed run, but layer 0"):
        folded(tiny_model(layers=6), method, removed, tmp_path)


@pytest.mark.parametrize("removed", [1, 2])
def test_laco_refuses_layers_that_are_low_rank_already(tmp_path: Path, removed: int) -> None:
    path = low_rank_checkpoint(tmp_path)
    with pytest.raises(PlanError, match=r"adds up whole weights, and layer 1 is low-rank already"):
        folded(path, "laco", [removed], tmp_path, layers=4)


def low_rank_checkpoint(tmp_path: Path) -> Path:
    """Save a checkpoint whose layer 1 is low-rank."""
    model = tiny_model()
    return saved_result(low_rank_plan(model, 1), open_checkpoint(model), tmp_path / "saved")
