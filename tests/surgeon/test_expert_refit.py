"""The refit of experts: the best over its rows where that is known, nearer to the original in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import REFIT_TOKENS as TOKENS
from surgery_helpers import Refitted, best_by_rows, low_rank_plan, refitted
from tiny_families import FLOAT32_ONLY, LAYERS
from tiny_models import decoder_layers, make_test_plan, packed_tokens, tiny_model, whole_boundaries
from torch import Tensor, nn
from transformers import PreTrainedModel

from layer_surgery.checkpoint.experts import Experts, experts_of
from layer_surgery.records import RefitRecord
from layer_surgery.surgeon import expert_refit
from layer_surgery.surgeon.expert_refit import expert_scale
from layer_surgery.walk.expert_moments import inner_activations

FLOAT32 = {"dtype": torch.float32}  # transformers' kernels for experts do not compute in float64


def of_experts(result: Refitted) -> list[RefitRecord]:
    return [record for record in result.records if record.linear.endswith("experts.down_proj")]


def last_experts(model: PreTrainedModel) -> tuple[nn.Module, Experts]:
    layer = decoder_layers(model)[-1]
    experts = experts_of(layer)
    assert experts is not None
    return layer.get_submodule(experts.module), experts


def called_with(model: PreTrainedModel, experts: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the experts get of the test's tokens (hidden [T, D], experts [T, K]), and what they give [T, D]."""
    seen: list[Any] = []
    hook = experts.register_forward_hook(lambda _module, arguments, output: seen.extend((*arguments[:2], output)))
    with torch.no_grad():
        model(TOKENS.token_ids, use_cache=False)
    hook.remove()
    return seen[0], seen[1], seen[2]


def test_where_a_token_has_one_expert_each_projection_is_the_best_over_its_rows(tmp_path: Path) -> None:
    """Of the last layer, given all that was re-solved before it."""
    one = {"num_experts_per_tok": 1, "num_local_experts": 2, **FLOAT32}
    model = tiny_model("mixtral", layers=3, **one)
    result = refitted(model, make_test_plan(3, removed=[1], method="remove"), tmp_path, **FLOAT32)
    operated = tiny_model("mixtral", layers=2, **one)
    operated.load_state_dict(result.tensors(result.after))
    module, experts = last_experts(operated)
    found = module.get_parameter("down_proj").detach().clone()
    original = model.get_parameter("model.layers.2.mlp.experts.down_proj").detach()
    module.get_parameter("down_proj").data = original.clone()
    hidden, chosen, output = called_with(operated, module)
    target = whole_boundaries(model, TOKENS)[3] - (whole_boundaries(operated, TOKENS)[2] - output.view(40, 12, -1))
    assert result.records[-1].linear == "mlp.experts.down_proj"
    for expert in range(2):
        z = inner_activations(experts, module, expert, hidden).detach().double().view(40, 12, -1)
        tokens = replace(TOKENS, valid=TOKENS.valid & (chosen == expert).view(40, 12))
        _ridge, expected = best_by_rows(original[expert].double(), z, target.detach().double(), tokens)
        assert float((found[expert] - expected).abs().max()) < 1e-3 * float(expected.abs().max())
        assert not torch.equal(found[expert], original[expert])


@pytest.mark.parametrize("model_type", FLOAT32_ONLY)
def test_the_stream_comes_nearer_than_without_experts(
    tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model(model_type, layers=LAYERS.get(model_type, 4), **FLOAT32), packed_tokens(40, 12)
    plan = low_rank_plan(model, 1, rank=3, layer_count=LAYERS.get(model_type, 4))
    result = refitted(model, plan, tmp_path / "with", tokens=tokens, **FLOAT32)
    records = of_experts(result)
    assert records and any(record.ridge is not None for record in records)
    assert all(record.error_after <= record.error_before for record in records)
    _before, with_experts = result.stream_errors(tmp_path, tokens)
    monkeypatch.setattr("layer_surgery.surgeon.refit.experts_of", lambda _layer: None)
    _before, without = refitted(model, plan, tmp_path / "without", tokens=tokens, **FLOAT32).stream_errors(
        tmp_path, tokens
    )
    assert with_experts < 0.97 * without


def test_experts_in_groups_are_solved_too_each_group_on_what_those_before_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = tiny_model("mixtral", **FLOAT32), packed_tokens(40, 12)
    plan = low_rank_plan(model, 1, rank=3)
    together = refitted(model, plan, tmp_path / "together", tokens=tokens, **FLOAT32)
    monkeypatch.setattr(expert_refit, "groups_of", lambda experts, _layer: [[n] for n in range(experts.number)])
    one_by_one = refitted(model, plan, tmp_path / "apart", tokens=tokens, **FLOAT32)
    errors = [result.stream_errors(tmp_path, tokens)[1] for result in (together, one_by_one)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert of_experts(one_by_one) != of_experts(together)
    assert len(of_experts(together)) == len(of_experts(one_by_one)) == 3


def test_an_expert_that_no_token_chose_stays_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_experts_per_tok=1, **FLOAT32)
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]  # one of both is positive
            layer.mlp.gate.weight[3] = 0
    result = refitted(model, low_rank_plan(model, 1, rank=3), tmp_path, **FLOAT32)
    old, new = (result.tensors(each)["model.layers.3.mlp.experts.down_proj"] for each in (result.before, result.after))
    assert torch.equal(old[3], new[3])
    assert not torch.equal(old[0], new[0])


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_how_experts_reach_the_stream_is_found_or_known_not_to_be_plain_addition(factor: float) -> None:
    model = tiny_model("mixtral")
    layer = decoder_layers(model)[0]
    experts = experts_of(layer)
    assert experts is not None
    hidden = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Block(nn.Module):
        def __init__(self, norm: bool) -> None:
            super().__init__()
            self.mlp, self.norm = layer.mlp, nn.LayerNorm(32, dtype=torch.float64) if norm else nn.Identity()

    def call(block: Any, stream: Tensor) -> Tensor:
        return stream + factor * block.norm(block.mlp(stream))

    layer.mlp.experts.config._experts_implementation = "eager"
    assert expert_scale(Block(norm=False), experts, call, hidden) == pytest.approx(factor)
    assert expert_scale(Block(norm=True), experts, call, hidden) is None
