"""Channels of experts and whole experts in the search: from a directory to a directory, plans, budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import load_stock, logits, model_with_vocabulary, saved_model, text_file
from transformers import AutoModelForCausalLM

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.errors import PlanError
from layer_surgery.records import SurgeryPlan

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"), "mixtral", layers=3)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = text_file(tmp_path_factory.mktemp("text") / "text.txt")
    return {"calibration": text, "eval_data": [text], "samples": 12, "sequence_length": 16, "multiple": 4}


def test_experts_give_way_to_a_small_budget_and_the_result_generates(
    model: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    report = layer_surgery.compress(model, output, layers=[1, 2], keep=0.3, **options)
    plan = report.plan
    assert plan.refit == "all" and plan.parameters <= plan.parameter_bound
    widths = {layer.index: layer.experts for layer in plan.smaller}
    assert widths.keys() == {1, 2} and all(width is not None and width % 8 == 0 for width in widths.values())
    assert plan.parameters == report.after.parameters == open_checkpoint(output).parameters
    assert {record.units for record in report.spectra} >= {"experts"}
    stock, info = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [stock.model.layers[index].mlp.experts.down_proj.shape[-1] for index in (1, 2)] == [*widths.values()]
    assert torch.equal(logits(stock, IDS), logits(layer_surgery.load(output), IDS))
    with_cache, without = (
        stock.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    dense, _ = load_stock(Path(str(layer_surgery.export_dense(output, tmp_path / "dense").output)))
    assert float((logits(dense, IDS) - logits(stock, IDS)).abs().max()) < 1e-5
    # The result can be cut again.
    again = layer_surgery.compress(
        output, no_save=True, layers=[0, 1], keep=0.6, refit=False, **options | {"components": "experts"}
    )
    assert again.after.parameters <= again.plan.parameter_bound < report.after.parameters


def test_channels_that_do_nothing_go_first_in_every_expert_and_change_nothing(
    options: dict[str, Any], tmp_path: Path
) -> None:
    original = model_with_vocabulary("mixtral", layers=3)
    idle = torch.rand(4, 40, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :16]  # others in each expert
    with torch.no_grad():
        for layer in original.model.layers:
            for expert, columns in enumerate(idle):
                layer.mlp.experts.down_proj[expert][:, columns] = 0
    model = saved_model(tmp_path / "model", model=original)
    share = 1 - 3 * 16 * 4 * 3 * 32 / open_checkpoint(model).parameters
    cache = tmp_path / "cache"
    for _from_cache in (False, True):
        report = layer_surgery.compress(
            model,
            tmp_path / "output",
            target_parameters=share + 1e-9,
            refit=False,
            cache=cache,
            overwrite=True,
            **options | {"components": "experts"},
        )
        assert [layer.kept for layer in report.plan.layers] == [{"experts": 24}] * 3
    result = layer_surgery.load(tmp_path / "output")
    assert float((logits(result, IDS) - logits(original, IDS)).abs().max()) < 1e-3


def test_budgets_of_operations_count_the_experts_that_a_token_chooses(model: Path, options: dict[str, Any]) -> None:
    only = options | {"components": "experts"}
    report = layer_surgery.compress(model, no_save=True, target_flops=0.8, refit=False, **only)
    before, after = report.before.flops_per_token, report.after.flops_per_token
    assert before is not None and after is not None and 0.6 < after / before <= 0.8
    gone = sum(40 - (layer.experts or 40) for layer in report.plan.layers)
    assert before - after == 2 * 2 * 3 * 32 * gone  # two of four experts, three matrices, 32 wide


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"action": "reduce", "experts": 0}, "0 experts; allowed: a whole number from 1 on, with reduce only"),
        ({"action": "keep", "experts": 8}, "action 'keep' and 8 experts"),
        ({"action": "reduce", "experts": 48}, "keeps 48 channels of experts, but its mixture of experts has 40"),
        ({"action": "reduce", "experts": 12}, "keeps 12 channels of experts; allowed: multiples of 8"),
        ({"action": "reduce", "routed": 1}, r"keeps 1 experts; allowed: 2 \(as many as a token goes through\) to 4"),
        ({"action": "reduce", "routed": 3, "experts": 8}, "fewer experts and fewer channels in each; give one of the"),
    ],
)
def test_plans_with_impossible_experts_are_refused(
    model: Path, options: dict[str, Any], entry: dict[str, Any], message: str
) -> None:
    data = {"layers": [{"index": 0, "action": "keep"}, {"index": 1, **entry}, {"index": 2, "action": "keep"}]}
    with pytest.raises(PlanError, match=message):
        layer_surgery.compress(model, no_save=True, plan=data, method="mix", **options)


def test_experts_of_a_model_without_any_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = saved_model(tmp_path / "llama", layers=3)
    with pytest.raises(PlanError, match="--components experts: none of the chosen layers can be cut in this way"):
        layer_surgery.compress(model, no_save=True, target_parameters=0.9, **options | {"components": "experts"})
    data = {"layers": [{"index": index, "action": "keep"} for index in range(3)]}
    data["layers"][1] |= {"action": "reduce", "experts": 8}
    SurgeryPlan.from_dict(data)
    with pytest.raises(PlanError, match="its mixture of experts is none of which channels of experts can be cut"):
        layer_surgery.compress(model, no_save=True, plan=data, method="mix", **options)


def test_experts_that_do_nothing_go_first_and_change_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    original = model_with_vocabulary("mixtral", layers=3)
    with torch.no_grad():
        for index, layer in enumerate(original.model.layers):
            layer.mlp.experts.down_proj[index] = 0
            layer.mlp.gate.weight[index] = -layer.mlp.gate.weight.sum(dim=0)  # chosen by few
    model = saved_model(tmp_path / "model", model=original)
    checkpoint = open_checkpoint(model)
    one = 3 * 32 * 40 + 32  # three matrices and a row of the router
    share = 1 - 3 * one / checkpoint.parameters
    report = layer_surgery.compress(
        model,
        tmp_path / "output",
        target_parameters=share + 1e-9,
        refit=False,
        **options | {"components": "routed"},
    )
    assert [layer.kept for layer in report.plan.layers] == [{"routed": 3}] * 3
    assert report.plan.predicted_loss_rise == 0 and report.after.parameters == checkpoint.parameters - 3 * one
    # The same number in all layers is a plain checkpoint.
    stock, info = load_stock(tmp_path / "output")
    assert not info["missing_keys"] and not info["unexpected_keys"] and stock.config.num_local_experts == 3
    for index, layer in enumerate(stock.model.layers):
        kept = [expert for expert in range(4) if expert != index]
        assert torch.equal(layer.mlp.gate.weight, original.model.layers[index].mlp.gate.weight[kept])
    page = (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
    assert "Removed experts of 3 of 3 layers" in page and "cut channels" not in page


@pytest.mark.parametrize(("component", "field"), [("experts", "intermediate_size"), ("routed", "num_local_experts")])
def test_uniform_experts_are_a_plain_checkpoint(
    model: Path, options: dict[str, Any], tmp_path: Path, component: str, field: str
) -> None:
    report = layer_surgery.compress(
        model, tmp_path / "output", target_parameters=0.8, uniform=True, **options | {"components": component}
    )
    (kept,) = {tuple(layer.kept.items()) for layer in report.plan.layers}
    stock, info = load_stock(tmp_path / "output")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert kept == ((component, getattr(stock.config, field)),)
    assert report.after.parameters == sum(p.numel() for p in stock.parameters()) <= 0.8 * report.before.parameters


def test_a_uniform_cut_that_no_field_can_say_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model", "deepseek_v3", layers=3)  # one field for experts and shared experts
    with pytest.raises(PlanError, match="--uniform: no field of the configuration of deepseek_v3 says this size"):
        layer_surgery.compress(
            model, no_save=True, target_parameters=0.8, uniform=True, **options | {"components": "experts"}
        )
