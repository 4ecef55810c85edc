"""Surgical methods against whole-model implementations that share no code with them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from surgery_helpers import ATTENTION, MLP, layer_tensors, operate, tiny_bench
from tiny_models import (
    CALIBRATION,
    changes,
    decoder_layers,
    full_ranks,
    hooks_on,
    largest_difference,
    make_test_plan,
    packed_tokens,
    settings,
    snapshot,
    streamed,
    tiny_checkpoint,
    tiny_model,
    walked_logits,
    whole_gradients,
    whole_logits,
    whole_losses,
)
from torch import Tensor
from transformers import PreTrainedModel

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError, UserError
from layer_surgery.linalg.low_rank import Factors, singular_value_gradients
from layer_surgery.runs.bench import Result
from layer_surgery.surgeon import METHODS, FactorStore, grasp

RANKS = dict.fromkeys(ATTENTION, 6) | dict.fromkeys(MLP, 9)


def product(result: Result, layer: int, linear: str) -> Tensor:
    """Return the dense weight that the factors stand for."""
    tensors = layer_tensors(result, layer)
    return tensors[f"{linear}.out_factor.weight"] @ tensors[f"{linear}.in_factor.weight"]


def singular_value_gradients_by_autograd(
    model: PreTrainedModel, tokens: PackedTokens, layer: int, linear: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return u, s, vh and dLoss/ds of one linear, by autograd through the model with `s` as its parameter."""
    name = f"model.layers.{layer}.{linear}.weight"
    u, s, vh = torch.linalg.svd(model.get_parameter(name).detach(), full_matrices=False)
    values = s.clone().requires_grad_()
    weights = {name: u @ torch.diag(values) @ vh}
    output = torch.func.functional_call(model, weights, (tokens.token_ids,), {"use_cache": False})
    (gradient,) = torch.autograd.grad(whole_losses(output.logits, tokens).sum(), values)
    return u, s, vh, gradient


def most_important(u: Tensor, s: Tensor, vh: Tensor, gradient: Tensor, rank: int) -> Tensor:
    """Return the dense sum of the `rank` groups with the largest |s * dLoss/ds|."""
    importance = [abs(float(a * b)) for a, b in zip(s, gradient, strict=True)]
    chosen = sorted(range(len(importance)), key=lambda k: -importance[k])[:rank]
    return sum((s[k] * torch.outer(u[:, k], vh[k]) for k in chosen), torch.zeros(u.shape[0], vh.shape[1]).double())


# SVD


@pytest.mark.parametrize(
    ("method", "model_type"),
    [("svd", "llama"), ("svd", "phi3"), ("svd", "starcoder2"), ("grasp", "llama"), ("grasp_sequential", "llama")],
)
def test_at_full_rank_the_logits_are_the_originals(tmp_path: Path, method: str, model_type: str) -> None:
    model = tiny_model(model_type)
    checkpoint = open_checkpoint(model)
    plan = make_test_plan(4, low_rank={k: full_ranks(checkpoint, k) for k in range(4)}, method=method)
    operated = operate(plan, checkpoint, tmp_path).checkpoint
    expected = whole_logits(model, CALIBRATION)
    assert largest_difference(walked_logits(streamed(operated), CALIBRATION, settings(tmp_path)), expected) < 1e-9


def test_svd_is_the_nearest_matrix_of_its_rank(tmp_path: Path) -> None:
    model = tiny_model()
    plan = make_test_plan(4, low_rank={1: RANKS, 3: RANKS})
    result = operate(plan, open_checkpoint(model), tmp_path / "factors")
    for index in (1, 3):
        for linear, rank in RANKS.items():
            weight = model.get_parameter(f"model.layers.{index}.{linear}.weight").detach()
            error = torch.linalg.norm(weight - product(result, index, linear))
            assert float(error) == pytest.approx(float(torch.linalg.svdvals(weight)[rank:].norm()), rel=1e-9)


@pytest.mark.parametrize("method", ["svd", "grasp", "grasp_sequential"])
def test_factors_have_the_ranks_of_the_plan_and_the_dtype_of_the_checkpoint(tmp_path: Path, method: str) -> None:
    ranks = {name: 1 + k for k, name in enumerate((*ATTENTION, *MLP))}
    plan = make_test_plan(4, low_rank={0: ranks, 2: {"mlp.up_proj": 3}}, method=method)
    result = operate(plan, open_checkpoint(tiny_model(dtype=torch.bfloat16)), tmp_path / "factors")
    for index, expected in ((0, ranks), (2, {"mlp.up_proj": 3})):
        tensors = layer_tensors(result, index)
        assert sum("_factor" in name for name in tensors) == 2 * len(expected)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        for linear, rank in expected.items():
            assert tensors[f"{linear}.out_factor.weight"].shape[1] == rank
            assert tensors[f"{linear}.in_factor.weight"].shape[0] == rank


# GRASP


@pytest.mark.parametrize("on_disk", [False, True])
def test_grasp_selects_the_groups_with_the_largest_importance(tmp_path: Path, on_disk: bool) -> None:
    model = tiny_model()
    path = tiny_checkpoint(tmp_path, model)
    plan = make_test_plan(4, low_rank={1: RANKS, 3: RANKS}, method="grasp")
    result = operate(plan, open_checkpoint(path), tmp_path / "factors", on_disk=on_disk)
    for index in (1, 3):
        for linear, rank in RANKS.items():
            expected = most_important(*singular_value_gradients_by_autograd(model, CALIBRATION, index, linear), rank)
            assert largest_difference(product(result, index, linear), expected) < 1e-9, (index, linear)


def test_grasp_does_not_select_what_plain_svd_selects(tmp_path: Path) -> None:
    """Guards the test above: importance and singular values order the groups of this model differently."""
    checkpoint = open_checkpoint(tiny_model())
    grasp = operate(make_test_plan(4, low_rank={1: RANKS}, method="grasp"), checkpoint, tmp_path / "grasp")
    svd = operate(make_test_plan(4, low_rank={1: RANKS}, method="svd"), checkpoint, tmp_path / "svd")
    for linear in RANKS:
        assert largest_difference(product(grasp, 1, linear), product(svd, 1, linear)) > 1e-3


def grasp_in_memory(model: PreTrainedModel, layers: list[int], ranks: dict[str, int]) -> PreTrainedModel:
    """GRASP as its paper has it, written plainly: last layer first, MLP then attention, new gradients for each."""
    operated = copy.deepcopy(model)
    for index in sorted(layers, reverse=True):
        for group in (MLP, ATTENTION):
            gradients = whole_gradients(operated, CALIBRATION)
            for linear in group:
                name = f"model.layers.{index}.{linear}.weight"
                weight = operated.get_parameter(name)
                u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
                gradient = torch.diagonal(u.T @ gradients[name] @ vh.T)
                with torch.no_grad():
                    weight.copy_(most_important(u, s, vh, gradient, ranks[linear]))
    return operated


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("layers", [[1, 3], [0, 1, 2]])
def test_sequential_grasp_equals_a_plain_implementation(tmp_path: Path, layers: list[int], on_disk: bool) -> None:
    model = tiny_model()
    expected = grasp_in_memory(model, layers, RANKS)
    plan = make_test_plan(4, low_rank=dict.fromkeys(layers, RANKS), method="grasp_sequential")
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, model))
    result = operate(plan, checkpoint, tmp_path / "factors", on_disk=on_disk)
    for index in layers:
        for linear in RANKS:
            weight = expected.get_parameter(f"model.layers.{index}.{linear}.weight").detach()
            assert largest_difference(product(result, index, linear), weight) < 1e-8, (index, linear)


def test_sequential_grasp_differs_from_grasp_at_once(tmp_path: Path) -> None:
    """Guards the test above: recomputed gradients select other groups in this model."""
    checkpoint = open_checkpoint(tiny_model())
    plans = [make_test_plan(4, low_rank={1: RANKS, 3: RANKS}, method=m) for m in ("grasp", "grasp_sequential")]
    once, sequential = (operate(plan, checkpoint, tmp_path / plan.method) for plan in plans)
    assert any(largest_difference(product(once, 1, n), product(sequential, 1, n)) > 1e-3 for n in ATTENTION)


@pytest.mark.parametrize("method", ["grasp", "grasp_sequential"])
def test_factors_do_not_depend_on_the_batch_size(tmp_path: Path, method: str) -> None:
    checkpoint, tokens = open_checkpoint(tiny_model()), packed_tokens(8, 10, padding=True, excluded=0.2)
    plan = make_test_plan(4, low_rank={1: RANKS, 2: RANKS}, method=method)
    one, three, eight = (
        operate(plan, checkpoint, tmp_path / str(size), tokens=tokens, batch_size=size) for size in (1, 3, 8)
    )
    for index in (1, 2):
        for name, tensor in layer_tensors(one, index).items():
            assert largest_difference(layer_tensors(three, index)[name], tensor) < 1e-10
            assert largest_difference(layer_tensors(eight, index)[name], tensor) < 1e-10


def test_grasp_importances_do_not_depend_on_the_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, tokens = open_checkpoint(tiny_model()), packed_tokens(8, 10, padding=True, excluded=0.2)
    seen: list[list[Tensor]] = []
    attributed_groups = grasp.attributed_groups

    def recorded(spectrum, gradient, rank):  # type: ignore[no-untyped-def]
        seen[-1].append((spectrum.s * singular_value_gradients(spectrum, gradient)).abs())
        return attributed_groups(spectrum, gradient, rank)

    monkeypatch.setattr(grasp, "attributed_groups", recorded)
    for size in (1, 3, 8):
        seen.append([])
        plan = make_test_plan(4, low_rank={1: RANKS}, method="grasp")
        operate(plan, checkpoint, tmp_path / str(size), tokens=tokens, batch_size=size)
    assert len(seen[0]) == len(RANKS)
    for other in seen[1:]:
        assert all(largest_difference(a, b) < 1e-10 for a, b in zip(seen[0], other, strict=True))


# Nothing left behind


@pytest.mark.parametrize("method", ["svd", "grasp", "grasp_sequential"])
def test_surgery_leaves_a_users_model_untouched(tmp_path: Path, method: str) -> None:
    model = tiny_model(tied=True).train()
    decoder_layers(model)[1].register_forward_hook(lambda *_: None)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").register_hook(lambda _gradient: None)
    decoder_layers(model)[3].requires_grad_(False)
    before = snapshot(model)
    plan = make_test_plan(4, low_rank={1: RANKS, 3: RANKS}, method=method)
    operate(plan, open_checkpoint(model), tmp_path / "factors")
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("method", ["grasp", "grasp_sequential"])
def test_surgery_that_fails_leaves_no_hook(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NumericalError("on purpose")

    monkeypatch.setattr(FactorStore, "write", fail)
    plan = make_test_plan(4, low_rank={1: RANKS}, method=method)
    with tiny_bench(open_checkpoint(tiny_checkpoint(tmp_path)), tmp_path) as bench:
        model = bench.model
        originals = list(model.layers)
        with pytest.raises(NumericalError):
            bench.operate(plan, method)
    assert hooks_on(model.model) == []
    assert list(model.layers) == originals
    assert all(p.is_meta and not p.requires_grad and p.grad is None for p in model.layers.parameters())


# Factors and registry


def test_factors_that_overflow_the_stored_dtype_are_refused(tmp_path: Path) -> None:
    store = FactorStore(tmp_path, torch.float16)
    with pytest.raises(NumericalError, match=r"out_factor of 'mlp.up_proj' in layer 3 is not finite in torch.float16"):
        store.write(3, {"mlp.up_proj": Factors(torch.full((2, 1), 1e6), torch.ones(1, 2))})


def test_factors_of_a_layer_add_up_over_several_writes(tmp_path: Path) -> None:
    store = FactorStore(tmp_path, torch.float64)
    for k, name in enumerate(("a", "b")):
        store.write(0, {name: Factors(torch.full((2, 1), float(k)), torch.ones(1, 2))})
    tensors = store.read(0)
    assert sorted(tensors) == [f"{n}.{part}.weight" for n in "ab" for part in ("in_factor", "out_factor")]
    assert math.isclose(float(tensors["b.out_factor.weight"].sum()), 2.0)
    assert sorted(store.source(0).specs) == sorted(tensors)


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown method 'grap'.*Did you mean 'grasp'\?"):
        METHODS["grap"]


def test_removal_makes_no_factors(tmp_path: Path) -> None:
    plan = make_test_plan(4, removed=[1], method="remove")
    operate(plan, open_checkpoint(tiny_model()), tmp_path)
    (factors,) = tmp_path.glob("factors-*")
    assert list(factors.iterdir()) == []
