"""Second moments, truncation in their metric, the knapsack, and the methods that use them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import LINEARS, RecordedMoments, layer_tensors, operate, statistics_source, walked_moments
from tiny_models import (
    CALIBRATION,
    decoder_layers,
    full_ranks,
    hooks_on,
    largest_difference,
    make_test_plan,
    packed_tokens,
    settings,
    streamed,
    tiny_model,
    walked_logits,
    whole_losses,
)
from torch import Tensor

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.linalg.low_rank import knapsack, shrunk, whitened_svd
from layer_surgery.records import SurgeryPlan
from layer_surgery.runs.bench import Result
from layer_surgery.surgeon import model_shape, plan_parameters
from layer_surgery.walk.walk import Walk


def random_moment(size: int, seed: int, tokens: int = 50) -> Tensor:
    rows = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.T @ rows / tokens


def cost(change: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    return 0.5 * float(torch.trace(outputs @ change @ inputs @ change.T))


# Moments


def test_moments_equal_those_of_the_whole_model_under_autograd(tmp_path: Path) -> None:
    """With padding and a loss mask in the data: padding must not enter, unlabelled tokens must."""
    ours = walked_moments(CALIBRATION, tmp_path)
    model = tiny_model("llama").requires_grad_(True)
    seen: dict[tuple[int, str], list[Tensor]] = {}
    for index, layer in enumerate(decoder_layers(model)):
        for name in LINEARS:

            def hook(_m, inputs, output, key=(index, name)):  # type: ignore[no-untyped-def]
                output.retain_grad()
                seen[key] = [inputs[0].detach(), output]

            layer.get_submodule(name).register_forward_hook(hook)
    logits = model(CALIBRATION.token_ids, use_cache=False).logits
    whole_losses(logits, CALIBRATION).sum().backward()
    count = int(CALIBRATION.valid.sum())
    assert not CALIBRATION.valid.all()
    for (index, name), (x, y) in seen.items():
        rows, gradients = x[CALIBRATION.valid], y.grad[CALIBRATION.valid]  # type: ignore[index]
        moments = ours[index]
        assert moments.tokens == count
        assert largest_difference(moments.input_moment(name), rows.T @ rows / count) < 1e-12
        assert largest_difference(moments.output_moment(name), gradients.T @ gradients / count) < 1e-12


def test_linears_that_read_the_same_tensor_share_one_input_moment(tmp_path: Path) -> None:
    moments = walked_moments(CALIBRATION, tmp_path)[0]
    assert set(moments.inputs) == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    assert moments.reads["self_attn.v_proj"] == "self_attn.q_proj"
    assert moments.reads["mlp.up_proj"] == "mlp.gate_proj"


def test_moments_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    results = [walked_moments(CALIBRATION, tmp_path, batch_size)[1] for batch_size in (1, 3, 8)]
    for other in results[1:]:
        for name in LINEARS:
            assert largest_difference(other.input_moment(name), results[0].input_moment(name)) < 1e-12
            assert largest_difference(other.output_moment(name), results[0].output_moment(name)) < 1e-12


def test_hooks_are_gone_after_success_and_after_an_exception(tmp_path: Path) -> None:
    model = streamed(open_checkpoint(tiny_model("llama")))
    with Walk(model, CALIBRATION, settings(tmp_path)) as walk:
        walk.forward([0, 1], keep=False, observers=[RecordedMoments()])
        assert hooks_on(model.model) == []
        with pytest.raises(RuntimeError, match="on purpose"):
            walk.forward([0, 1], keep=False, observers=[RecordedMoments(fail=True)])
    assert hooks_on(model.model) == []


# Shrinkage and whitening


def test_shrinkage_keeps_the_trace_and_fades_as_tokens_grow() -> None:
    moment = random_moment(12, seed=0)
    distances = []
    for tokens in (2, 10, 100, 1000, 100_000):
        result = shrunk(moment, tokens)
        assert float(result.trace()) == pytest.approx(float(moment.trace()))
        distances.append(float((result - moment).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 100 * distances[-1]


@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_a_singular_moment_becomes_positive_definite(tokens: int) -> None:
    moment = random_moment(24, seed=1, tokens=tokens)
    assert float(torch.linalg.eigvalsh(moment)[0]) < 1e-9
    assert float(torch.linalg.eigvalsh(shrunk(moment, tokens))[0]) > 0


def test_a_moment_of_zeros_becomes_the_identity() -> None:
    assert torch.equal(shrunk(torch.zeros(3, 3), 7), torch.eye(3))


@pytest.mark.parametrize(("out", "in_"), [(7, 10), (10, 7), (8, 8)])
def test_predicted_cost_is_the_quadratic_form_of_the_change(out: int, in_: int) -> None:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs, outputs = random_moment(in_, 3), random_moment(out, 4)
    (left, right), values = whitened_svd(weight, inputs, outputs)
    for rank in range(min(out, in_) + 1):
        change = left[:, :rank] @ right[:rank] - weight
        assert cost(change, inputs, outputs) == pytest.approx(0.5 * float((values[rank:] ** 2).sum()), abs=1e-10)


def test_no_other_replacement_of_the_same_rank_costs_less() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    inputs, outputs = random_moment(9, 6), random_moment(6, 7)
    (left, right), _ = whitened_svd(weight, inputs, outputs)
    best = cost(left[:, :2] @ right[:2] - weight, inputs, outputs)
    for _ in range(50):
        shake = 0.05 * torch.randn(2, 9, generator=generator, dtype=torch.float64)
        tilt = 0.05 * torch.randn(6, 2, generator=generator, dtype=torch.float64)
        assert cost((left[:, :2] + tilt) @ (right[:2] + shake) - weight, inputs, outputs) > best


def test_a_weight_of_rank_r_is_reproduced_exactly_at_rank_r() -> None:
    generator = torch.Generator().manual_seed(8)
    weight = torch.randn(8, 3, generator=generator, dtype=torch.float64) @ torch.randn(
        3, 11, generator=generator, dtype=torch.float64
    )
    (left, right), values = whitened_svd(weight, random_moment(11, 9), random_moment(8, 10))
    assert largest_difference(left[:, :3] @ right[:3], weight) < 1e-10
    assert float((values[3:] ** 2).sum()) < 1e-13 * float((values**2).sum())  # their cost, not their values


def test_with_the_identity_on_both_sides_it_is_plain_truncated_svd() -> None:
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    (left, right), values = whitened_svd(weight, torch.eye(6).double(), torch.eye(5).double())
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    assert largest_difference(left[:, :2] @ right[:2], (u[:, :2] * s[:2]) @ vh[:2]) < 1e-12
    assert largest_difference(values, s) < 1e-12


# Knapsack


def kept_worth(values: list[list[float]], ranks: list[int]) -> float:
    return sum(0.5 * v**2 for row, rank in zip(values, ranks, strict=True) for v in row[:rank])


@pytest.mark.parametrize("seed", range(8))
def test_knapsack_equals_brute_force_where_all_ranks_cost_the_same(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [sorted(torch.rand(4, generator=generator).tolist(), reverse=True) for _ in range(3)]
    for budget in range(9, 37):
        ranks = knapsack(values, [3, 3, 3], [4, 4, 4], budget)
        feasible = [r for r in itertools.product(range(1, 5), repeat=3) if 3 * sum(r) <= budget]
        assert kept_worth(values, ranks) == pytest.approx(max(kept_worth(values, list(r)) for r in feasible))


@pytest.mark.parametrize("seed", range(8))
def test_knapsack_is_within_one_component_of_brute_force_where_costs_differ(seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    values = [sorted(torch.rand(4, generator=generator).tolist(), reverse=True) for _ in range(3)]
    costs = [3, 5, 4]
    for budget in range(12, 49):
        ranks = knapsack(values, costs, [4, 4, 4], budget)
        spent = sum(r * c for r, c in zip(ranks, costs, strict=True))
        open_costs = [c for r, c in zip(ranks, costs, strict=True) if r < 4]
        assert spent <= budget
        assert not open_costs or budget - spent < min(open_costs)
        feasible = [
            r
            for r in itertools.product(range(1, 5), repeat=3)
            if sum(a * b for a, b in zip(r, costs, strict=True)) <= budget
        ]
        best = max(kept_worth(values, list(r)) for r in feasible)
        assert kept_worth(values, ranks) >= best - 0.5 * max(row[0] for row in values) ** 2


def test_knapsack_refuses_a_budget_below_one_rank_each() -> None:
    with pytest.raises(ValueError, match="costs 7, the budget is 6"):
        knapsack([[1.0], [1.0]], [3, 4], [1, 1], 6)


# Methods


@pytest.mark.parametrize("method", ["svd_llm", "fisher"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "starcoder2"])
def test_full_rank_reproduces_the_logits(tmp_path: Path, method: str, model_type: str) -> None:
    checkpoint = open_checkpoint(tiny_model(model_type))
    plan = make_test_plan(4, low_rank={1: full_ranks(checkpoint, 1), 2: full_ranks(checkpoint, 2)}, method=method)
    result = operate(plan, checkpoint, tmp_path, ranks_fixed=True).checkpoint
    tokens = packed_tokens(2, 10)
    ours = walked_logits(streamed(result), tokens, settings(tmp_path))
    theirs = walked_logits(streamed(checkpoint), tokens, settings(tmp_path))
    assert largest_difference(ours, theirs) < 1e-8


def run_fisher(
    tmp_path: Path, ranks: dict[str, int], *, slack: int = 0, **options: Any
) -> tuple[Checkpoint, SurgeryPlan, Result]:
    """Return the original, the plan and the result; `options` are those of `operate`."""
    checkpoint = open_checkpoint(tiny_model())
    plan = make_test_plan(4, low_rank={1: ranks, 2: ranks}, method="fisher")
    parameters = plan_parameters(model_shape(checkpoint), plan)
    plan = replace(plan, parameters=parameters, parameter_bound=parameters + slack)
    return checkpoint, plan, operate(plan, checkpoint, tmp_path, **options)


def test_fisher_moves_ranks_within_the_bound_and_reports_the_true_number_of_parameters(tmp_path: Path) -> None:
    _, plan, result = run_fisher(tmp_path, dict.fromkeys(LINEARS, 4), ranks_fixed=False, slack=9)
    done = result.plan
    assert [layer.ranks for layer in done.low_rank] != [layer.ranks for layer in plan.low_rank]
    assert done.parameters == result.checkpoint.parameters <= plan.parameter_bound
    assert done.predicted_loss_rise > 0


def test_fisher_keeps_the_ranks_that_the_user_gave(tmp_path: Path) -> None:
    _, plan, result = run_fisher(tmp_path, dict.fromkeys(LINEARS, 4), ranks_fixed=True)
    assert result.plan.layers == plan.layers
    assert result.checkpoint.low_rank["model.layers.2.mlp.down_proj"] == 4


def test_knapsack_ranks_predict_less_loss_than_uniform_ones(tmp_path: Path) -> None:
    ranks = dict.fromkeys(LINEARS, 3)
    source = statistics_source(tmp_path)
    fixed = run_fisher(tmp_path, ranks, ranks_fixed=True, statistics=source)[2].plan
    chosen = run_fisher(tmp_path, ranks, ranks_fixed=False, statistics=source)[2].plan
    assert source._statistics is not None
    costs = [sum(source._statistics.cost(e.index, e.ranks) for e in plan.low_rank) for plan in (chosen, fixed)]
    assert costs[0] < costs[1]


def test_svd_llm_changes_the_outputs_on_its_calibration_data_less_than_svd(tmp_path: Path) -> None:
    """The defining property: least squared error of W x over the calibration inputs, at the same rank."""
    checkpoint = open_checkpoint(tiny_model("llama"))
    tokens = packed_tokens(40, 16)
    moments = walked_moments(tokens, tmp_path)[1]
    weight = tiny_model("llama").get_parameter("model.layers.1.mlp.down_proj.weight").detach()
    errors = {}
    for method in ("svd", "svd_llm"):
        plan = make_test_plan(4, low_rank={1: {"mlp.down_proj": 5}}, method=method)
        tensors = layer_tensors(operate(plan, checkpoint, tmp_path / method, tokens=tokens), 1)
        change = tensors["mlp.down_proj.out_factor.weight"] @ tensors["mlp.down_proj.in_factor.weight"] - weight
        errors[method] = float(torch.trace(change @ moments.input_moment("mlp.down_proj") @ change.T))
    assert errors["svd_llm"] < errors["svd"]


def test_cost_is_the_quadratic_form_summed_over_all_replaced_linears(tmp_path: Path) -> None:
    """Nats per token that carries loss: the moments are means over all tokens, so the masks' ratio enters."""
    ranks, source = dict.fromkeys(LINEARS, 4), statistics_source(tmp_path)
    checkpoint, _, result = run_fisher(tmp_path, ranks, ranks_fixed=True, statistics=source)
    moments = walked_moments(CALIBRATION, tmp_path)
    total = 0.0
    for index in (1, 2):
        tensors = layer_tensors(result, index)
        for name in LINEARS:
            weight = checkpoint.source.read([f"model.layers.{index}.{name}.weight"], torch.device("cpu")).popitem()[1]
            product = tensors[f"{name}.out_factor.weight"] @ tensors[f"{name}.in_factor.weight"]
            inputs = shrunk(moments[index].input_moment(name), moments[index].tokens)
            outputs = shrunk(moments[index].output_moment(name), moments[index].tokens)
            total += cost(product - weight, inputs, outputs)
    ratio = int(CALIBRATION.valid.sum()) / CALIBRATION.predicted_tokens
    assert source._statistics is not None
    assert sum(source._statistics.cost(index, ranks) for index in (1, 2)) == pytest.approx(ratio * total, rel=1e-7)
