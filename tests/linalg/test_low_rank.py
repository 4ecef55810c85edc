"""The linear algebra of low-rank replacements, in closed form and against autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import (
    decoder_layers,
    largest_difference,
    packed_tokens,
    settings,
    streamed,
    tiny_model,
    walked_gradients,
    whole_losses,
)
from torch import Tensor

from layer_surgery.checkpoint.modeling_layer_surgery import LowRankLinear
from layer_surgery.linalg.low_rank import attributed_groups, select_groups, singular_value_gradients, svd, truncated
from layer_surgery.walk.walk import Walk

SHAPES = [(7, 4), (4, 7), (5, 5), (1, 6), (6, 1)]


def random_matrix(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_factors_multiply_to_the_weight(shape: tuple[int, int]) -> None:
    weight = random_matrix(shape)
    left, right = truncated(svd(weight), min(shape))
    assert left.shape == (shape[0], min(shape))
    assert right.shape == (min(shape), shape[1])
    assert largest_difference(left @ right, weight) < 1e-12


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncation_error_is_that_of_the_dropped_singular_values(rank: int) -> None:
    weight = random_matrix((7, 4))
    left, right = truncated(svd(weight), rank)
    dropped = torch.linalg.svdvals(weight)[rank:]
    assert float(torch.linalg.norm(weight - left @ right)) == pytest.approx(float(dropped.norm()), rel=1e-12)


def test_a_known_matrix_gives_its_known_leading_term() -> None:
    left, right = truncated(svd(torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64))), 1)
    assert largest_difference(left @ right, torch.diag(torch.tensor([0.0, 9.0, 0.0], dtype=torch.float64))) < 1e-12
    assert sorted(left.abs().flatten().tolist()) == pytest.approx([0, 0, 3], abs=1e-12)


def test_singular_values_are_split_evenly_between_the_factors() -> None:
    weight = random_matrix((7, 4))
    left, right = truncated(svd(weight), 3)
    values = torch.linalg.svdvals(weight)[:3]
    assert largest_difference((left**2).sum(dim=0), values) < 1e-12
    assert largest_difference((right**2).sum(dim=1), values) < 1e-12


def test_selected_groups_sum_to_the_selected_terms() -> None:
    weight = random_matrix((7, 4))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    left, right = select_groups(svd(weight), torch.tensor([3, 1]))
    expected = sum(s[k] * torch.outer(u[:, k], vh[k]) for k in (1, 3))
    assert largest_difference(left @ right, expected) < 1e-12


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_decompositions_run_in_float32_or_better(given: torch.dtype, computed: torch.dtype) -> None:
    spectrum = svd(random_matrix((5, 4), dtype=given))
    assert {part.dtype for part in spectrum} == {computed}


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_singular_values_equal_autograds(shape: tuple[int, int]) -> None:
    spectrum = svd(random_matrix(shape))
    target = random_matrix(shape, seed=1)
    s = spectrum.s.clone().requires_grad_()
    weight = spectrum.u @ torch.diag(s) @ spectrum.vh
    loss = (torch.tanh(weight) * target).sum()
    gradient, expected = torch.autograd.grad(loss, (weight, s))
    assert largest_difference(singular_value_gradients(spectrum, gradient), expected) < 1e-12


@pytest.mark.parametrize("model_type", ["llama", "starcoder2", "phi3"])
def test_one_backward_walk_gives_the_gradient_of_every_singular_value(tmp_path: Path, model_type: str) -> None:
    """Against autograd on a layer whose every linear is `U diag(s) V^T` with `s` as the parameter."""
    model, tokens = tiny_model(model_type), packed_tokens(3, 10, excluded=0.3)
    streaming = streamed(model)
    prefix = "model.layers.2."
    names = [f"{prefix}{linear}.weight" for linear in streaming.architecture.linears]
    spectra = {name: svd(model.get_parameter(name).detach()) for name in names}
    values = {name: spectrum.s.clone().requires_grad_() for name, spectrum in spectra.items()}
    weights = {name: spectra[name].u @ torch.diag(values[name]) @ spectra[name].vh for name in names}
    output = torch.func.functional_call(model, weights, (tokens.token_ids,), {"use_cache": False})
    expected = torch.autograd.grad(whole_losses(output.logits, tokens).sum(), list(values.values()))
    with Walk(streaming, tokens, settings(tmp_path)) as walk:
        gradients = walked_gradients(walk)
    assert len(names) == len([p for p in decoder_layers(model)[2].parameters() if p.dim() == 2])
    for name, gradient in zip(names, expected, strict=True):
        assert largest_difference(singular_value_gradients(spectra[name], gradients[name]), gradient) < 1e-9, name


def test_attributed_groups_are_those_whose_removal_matters_most_to_first_order() -> None:
    spectrum, gradient = svd(random_matrix((6, 5))), random_matrix((6, 5), seed=1)
    importance = [
        abs(float(spectrum.s[k] * (torch.outer(spectrum.u[:, k], spectrum.vh[k]) * gradient).sum())) for k in range(5)
    ]
    expected = sorted(range(5), key=lambda k: -importance[k])
    assert attributed_groups(spectrum, gradient, 3).tolist() == expected[:3]
    assert attributed_groups(spectrum, gradient, 5).tolist() == expected
    assert expected != list(range(5)), "the order is not that of the singular values alone"


def test_attributed_groups_of_a_zero_gradient_are_the_largest_singular_values() -> None:
    spectrum = svd(random_matrix((6, 5)))
    assert attributed_groups(spectrum, torch.zeros(6, 5, dtype=torch.float64), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_linear_computes_what_the_product_of_its_factors_does(bias: bool) -> None:
    layer = LowRankLinear(6, 5, 2, bias=bias, dtype=torch.float64)
    if bias:
        layer.bias.data.copy_(random_matrix((5,)))
    x = random_matrix((3, 2, 6), seed=1)
    expected = torch.nn.functional.linear(x, layer.out_factor.weight @ layer.in_factor.weight, layer.bias)
    assert largest_difference(layer(x), expected) < 1e-12
    assert sum(p.numel() for p in layer.parameters()) == 2 * (6 + 5) + (5 if bias else 0)
