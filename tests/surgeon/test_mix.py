"""The method `mix`: one search over all kinds of components, under any budgets, from a directory to a directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import listing, load_stock, logits, model_with_vocabulary, saved_model, tensors_of, text_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import layer_surgery
from layer_surgery import SurgeryReport
from layer_surgery.calibration.couplings import Couplings
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.config import COMPONENTS, DEFAULT_COMPONENTS
from layer_surgery.errors import PlanError, UserError
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.components import KINDS

IDS = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = text_file(tmp_path_factory.mktemp("text") / "text.txt")
    return {"calibration": text, "eval_data": [text], "samples": 12, "sequence_length": 16, "multiple": 4}


@pytest.fixture(scope="module")
def whole_model(
    model: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SurgeryReport]:
    output = tmp_path_factory.mktemp("mix") / "output"
    return output, layer_surgery.compress(model, output, target_parameters=0.8, **options)


def test_a_lone_budget_is_spread_over_all_layers_and_met(model: Path, whole_model: tuple[Path, SurgeryReport]) -> None:
    output, report = whole_model
    plan, total = report.plan, open_checkpoint(model).parameters
    assert plan.method == "mix" and report.scores is None and plan.refit == "all"
    assert plan.surviving == [0, 1, 2, 3] and len(plan.smaller) >= 3
    assert any(layer.channels for layer in plan.smaller)
    # Below the bound by less than the dearest single step: four channels, or four ranks of the largest linear.
    step = 4 * max(3 * 32, 32 + 48)
    assert plan.parameter_bound == int(0.8 * total) and 0 <= plan.parameter_bound - plan.parameters < step
    assert plan.parameters == report.after.parameters == open_checkpoint(output).parameters
    kept = [number for layer in plan.smaller for number in layer.kept.values()]
    assert all(number % 4 == 0 for number in kept)
    assert plan.predicted_loss_rise is not None and plan.predicted_loss_rise > 0


def test_the_result_loads_in_stock_transformers_and_generates(whole_model: tuple[Path, SurgeryReport]) -> None:
    output, report = whole_model
    stock, info = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = layer_surgery.load(output)
    assert torch.equal(logits(stock, IDS), logits(ours, IDS))
    widths = {layer.index: layer.channels for layer in report.plan.smaller if layer.channels}
    for index, width in widths.items():
        assert stock.model.layers[index].mlp.down_proj.in_features == width
        assert type(stock.model.layers[index].mlp.up_proj) is torch.nn.Linear
    with_cache, without = (
        stock.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    stock.save_pretrained(output.parent / "again")
    assert tensors_of(output.parent / "again").keys() == tensors_of(output).keys()


def test_its_plan_gives_the_same_model_again_and_can_be_edited(
    model: Path, options: dict[str, Any], whole_model: tuple[Path, SurgeryReport], tmp_path: Path
) -> None:
    output, report = whole_model
    layer_surgery.compress(model, tmp_path / "again", plan=output / "surgery.json", **options)
    first, second = listing(output), listing(tmp_path / "again")
    assert first["model.safetensors"] == second["model.safetensors"] and first["config.json"] == second["config.json"]
    data = report.plan.to_dict()
    place = next(layer for layer in data["layers"] if layer["channels"])
    place["channels"] -= 3
    edited = layer_surgery.compress(model, no_save=True, plan=data, **options)
    assert edited.plan.layers[place["index"]].channels == place["channels"]
    assert edited.after.parameters == report.after.parameters - 3 * 3 * 32


def test_statistics_from_a_cache_give_the_same_model(
    model: Path, options: dict[str, Any], whole_model: tuple[Path, SurgeryReport], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        layer_surgery.compress(model, tmp_path / name, target_parameters=0.8, cache=tmp_path / "cache", **options)
        assert listing(tmp_path / name)["model.safetensors"] == listing(whole_model[0])["model.safetensors"]


def test_channels_that_do_nothing_go_first_and_change_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    original = model_with_vocabulary(layers=4)
    with torch.no_grad():
        for layer in original.model.layers:
            layer.mlp.down_proj.weight[:, 5:25] = 0
    model = saved_model(tmp_path / "model", model=original)
    # Twenty channels of three linears, 32 wide, in four layers.
    share = 1 - 4 * 20 * 3 * 32 / open_checkpoint(model).parameters
    report = layer_surgery.compress(
        model, tmp_path / "output", target_parameters=share + 1e-9, refit=False, **options | {"components": "channels"}
    )
    assert [layer.kept for layer in report.plan.layers] == [{"channels": 20}] * 4
    result = layer_surgery.load(tmp_path / "output")
    assert float((logits(result, IDS) - logits(original, IDS)).abs().max()) < 1e-4


def test_a_refit_brings_it_nearer_to_the_original(
    model: Path, options: dict[str, Any], whole_model: tuple[Path, SurgeryReport]
) -> None:
    without = layer_surgery.compress(model, no_save=True, target_parameters=0.8, refit=False, **options)
    assert without.plan.layers == whole_model[1].plan.layers
    (before,), (after,) = (
        [divergence.mean for divergence in report.comparison.kl_divergence.values()]
        for report in (without, whole_model[1])
    )
    assert after < before


def test_with_a_number_of_layers_the_others_stay_whole(model: Path, options: dict[str, Any], tmp_path: Path) -> None:
    report = layer_surgery.compress(
        model, tmp_path / "output", layers=[1, 2], keep=0.4, method="mix", refit=False, **options
    )
    assert [layer.action for layer in report.plan.layers if layer.index in (0, 3)] == ["keep", "keep"]
    assert report.plan.parameters <= report.plan.parameter_bound
    original, result = tensors_of(model), tensors_of(tmp_path / "output")
    assert all(torch.equal(original[name], result[name]) for name in original if ".layers.0." in name)


def test_uniform_widths_are_a_plain_checkpoint(model: Path, options: dict[str, Any], tmp_path: Path) -> None:
    report = layer_surgery.compress(model, tmp_path / "output", target_parameters=0.85, uniform=True, **options)
    (width,) = {layer.channels for layer in report.plan.layers}
    plain, info = load_stock(tmp_path / "output")
    assert type(plain) is LlamaForCausalLM and plain.config.intermediate_size == width
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not (tmp_path / "output" / "modeling_layer_surgery.py").exists()
    assert sum(parameter.numel() for parameter in plain.parameters()) == report.after.parameters


def test_uniform_numbers_of_heads_are_a_plain_checkpoint_too(
    model: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    layer_surgery.compress(
        model, tmp_path / "output", target_kv_cache=0.5, uniform=True, **options | {"components": ["channels", "heads"]}
    )
    plain, info = load_stock(tmp_path / "output")
    assert type(plain) is LlamaForCausalLM and plain.config.num_key_value_heads == 1
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not (tmp_path / "output" / "modeling_layer_surgery.py").exists()
    assert torch.isfinite(logits(plain, IDS)).all()


def test_heads_that_become_equal_in_a_second_cut_keep_their_width(
    model: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    def cut(base: Path, output: Path, cut_layers: set[int]) -> Path:
        layers = [
            {"index": index, "action": "reduce", "heads": 1}
            if index in cut_layers
            else {"index": index, "action": "keep"}
            for index in range(4)
        ]
        layer_surgery.compress(base, output, plan={"layers": layers}, method="mix", **options)
        return output

    once = cut(model, tmp_path / "once", {0})
    plain, info = load_stock(cut(once, tmp_path / "twice", {1, 2, 3}))
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (plain.config.num_attention_heads, plain.config.num_key_value_heads) == (2, 1)
    assert plain.config.head_dim == open_checkpoint(model).config.head_dim


def test_one_width_with_different_numbers_of_heads_is_no_plain_checkpoint(
    model: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    layers = [{"index": index, "action": "reduce", "ranks": {}, "channels": 20} for index in range(4)]
    layers[2] |= {"heads": 1}
    layer_surgery.compress(model, tmp_path / "output", plan={"layers": layers}, method="mix", **options)
    result, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "output", trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert [layer.self_attn.k_proj.out_features for layer in result.model.layers] == [24, 24, 12, 24]


def test_components_say_what_may_be_cut(model: Path, options: dict[str, Any]) -> None:
    for components, has_channels, has_ranks in (("channels", True, False), ("singular", False, True)):
        plan = layer_surgery.compress(
            model, no_save=True, target_parameters=0.85, refit=False, **options | {"components": components}
        ).plan
        assert any(layer.channels for layer in plan.layers) == has_channels
        assert any(layer.ranks for layer in plan.layers) == has_ranks


def test_a_result_can_be_made_smaller_again(
    options: dict[str, Any], whole_model: tuple[Path, SurgeryReport], tmp_path: Path
) -> None:
    data = {name: value for name, value in options.items() if name != "multiple"}
    report = layer_surgery.compress(
        whole_model[0], tmp_path / "output", layers=[3], keep=0, method="remove", refit=False, **data
    )
    assert report.after.layers == 3
    assert torch.isfinite(logits(layer_surgery.load(tmp_path / "output"), IDS)).all()


def test_a_narrowed_result_can_be_narrowed_and_made_low_rank_again(
    model: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    once, again = tmp_path / "once", tmp_path / "again"
    layer_surgery.compress(model, once, target_parameters=0.85, target_kv_cache=0.7, **options)
    report = layer_surgery.compress(once, again, target_parameters=0.85, **options)
    assert any(layer.ranks for layer in report.plan.smaller) and any(layer.channels for layer in report.plan.smaller)
    stock, info = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert sum(parameter.numel() for parameter in stock.parameters()) == report.after.parameters
    assert torch.equal(logits(stock, IDS), logits(layer_surgery.load(again), IDS))
    both = set(stock.config.narrowed) & set(stock.config.low_rank)
    assert both  # linears of cut heads, as factors of the smaller size
    dense, _ = load_stock(Path(str(layer_surgery.export_dense(again, tmp_path / "dense").output)))
    assert float((logits(dense, IDS) - logits(stock, IDS)).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "svd"}, PlanError, "--method svd works on a number of layers; give --target-layers or --layers"),
        ({"target_parameters": 0.2}, PlanError, "cannot be reached by cutting channels, singular in multiples of 4"),
        (
            {"target_kv_cache": 0.7, "components": "channels"},
            PlanError,
            "--target-kv-cache 0.7 cannot be reached by cutting channels in multiples of 4; reachable: --target-kv",
        ),
        (
            {"layers": [1], "target_parameters": None, "target_flops": 0.3},
            PlanError,
            "--target-flops 0.3 cannot be reached by cutting channels, singular in multiples of 4; reachable: --t",
        ),
        ({"layers": [1], "target_parameters": 0.1}, PlanError, "cannot be reached by cutting channels, singular in"),
        ({"layers": [1], "method": "fisher", "target_flops": 0.9}, PlanError, "--target-flops needs a method that"),
        ({"layers": [1], "uniform": True}, PlanError, "--uniform gives all layers one width, so all take part"),
        ({"target_size": 10**6}, PlanError, "--target-size and --target-parameters are the same budget in two units"),
        ({"target_kv_cache": 0}, PlanError, "--target-kv-cache is 0; allowed: a fraction above 0, up to 1"),
        ({"target_time": 1.5}, PlanError, "--target-time is 1.5; allowed"),
        ({"components": "channel"}, UserError, "--components is 'channel'; allowed: some of channels, singular, heads"),
        ({"components": []}, UserError, "--components is ''"),
        (
            {"components": "singular", "uniform": True},
            UserError,
            "--uniform cuts channels, heads, experts, routed, and --components names",
        ),
        ({"multiple": 0}, UserError, "--multiple is 0; allowed: 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(
    model: Path, options: dict[str, Any], tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"target_parameters": 0.8, **options, **changes}
    with pytest.raises(error, match=message):
        layer_surgery.compress(model, tmp_path / "output", **arguments)
    assert not list(tmp_path.iterdir())


def test_the_smallest_budget_that_an_error_names_is_reached(model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        layer_surgery.compress(model, no_save=True, target_parameters=0.2, **options)
    least = float(str(caught.value).partition("--target-parameters ")[2].partition(" ")[0])
    report = layer_surgery.compress(model, no_save=True, target_parameters=least, refit=False, **options)
    assert report.after.parameters <= least * report.before.parameters


# A linear map in the place of an MLP


def test_a_bypass_is_refitted_planned_cached_and_cut_again(
    model: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    asked = {"target_parameters": 0.7, "components": ["bypass", "attention"], "cache": tmp_path / "cache"}
    report = layer_surgery.compress(model, tmp_path / "refitted", **options | asked)
    bypassed = [layer.index for layer in report.plan.layers if layer.bypass]
    assert bypassed and report.after.parameters <= 0.7 * report.before.parameters
    solved = {(record.layer, record.linear) for record in report.refit}
    assert {(index, "mlp") for index in bypassed} <= solved
    unrefitted = layer_surgery.compress(model, tmp_path / "plain", refit=False, **options | asked)
    (with_refit,), (without,) = (
        [divergence.mean for divergence in each.comparison.kl_divergence.values()] for each in (report, unrefitted)
    )
    assert with_refit < without
    again = layer_surgery.compress(model, tmp_path / "again", plan=tmp_path / "refitted" / "surgery.json", **options)
    assert again.plan.layers == report.plan.layers
    assert listing(tmp_path / "again")["model.safetensors"] == listing(tmp_path / "refitted")["model.safetensors"]
    twice = layer_surgery.compress(tmp_path / "refitted", tmp_path / "twice", target_parameters=0.95, **options)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True)
    assert torch.equal(logits(stock, IDS), logits(layer_surgery.load(tmp_path / "twice"), IDS))
    assert twice.after.parameters < report.after.parameters
    assert "put a linear map in the place of the MLPs of" in " ".join(
        (tmp_path / "refitted" / "report.html").read_text(encoding="utf-8").replace("Put", "put").split()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bypass": 33}, "layer 1 has a bypass of rank 33; allowed: 1 to 32, the hidden size"),
        ({"bypass": 4, "channels": 8}, "takes the place of its MLP, and also channels; give one of the two"),
        ({"bypass": 4, "ranks": {"mlp.up_proj": 4}}, "and also a rank for 'mlp.up_proj'; give one"),
        ({"bypass": 0}, "has action 'reduce' and 0 bypass; allowed: a whole number from 1 on"),
    ],
)
def test_a_wrong_bypass_in_a_plan_is_refused(
    model: Path, options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    layers = [{"index": index, "action": "keep"} for index in range(4)]
    layers[1] = {"index": 1, "action": "reduce", **change}
    with pytest.raises(PlanError, match=message):
        layer_surgery.compress(model, no_save=True, plan={"method": "mix", "layers": layers}, **options)


# Other budgets


def test_a_kv_cache_budget_is_met_by_heads(model: Path, options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "output"
    report = layer_surgery.compress(
        model, output, target_kv_cache=0.7, **options | {"components": ["heads", "singular"]}
    )
    assert report.plan.parameter_bound == report.before.parameters and report.plan.bounds.keys() == {"kv_cache_bytes"}
    before, after = (result.kv_cache_bytes_per_token for result in (report.before, report.after))
    assert before is not None and after is not None and after == 5 / 8 * before
    assert {layer.heads for layer in report.plan.smaller} == {1} and len(report.plan.smaller) == 3
    stock, info = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(stock, IDS), logits(layer_surgery.load(output), IDS))
    with_cache, without = (
        stock.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    cache = stock(IDS, use_cache=True).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [layer.heads or 2 for layer in report.plan.layers]
    dense, _ = load_stock(layer_surgery.export_dense(output, tmp_path / "dense").output)
    assert float((logits(dense, IDS) - logits(stock, IDS)).abs().max()) < 1e-5


def test_by_default_a_kv_cache_budget_removes_whole_attentions_where_heads_do_not_do(
    model: Path, options: dict[str, Any]
) -> None:
    report = layer_surgery.compress(model, no_save=True, target_kv_cache=0.2, refit=False, **options)
    gone = [layer.index for layer in report.plan.layers if layer.ranks.get("self_attn.o_proj") == 0]
    assert gone and report.after.kv_cache_bytes_per_token <= 0.2 * report.before.kv_cache_bytes_per_token


def test_a_layer_of_which_both_parts_go_is_removed(options: dict[str, Any], tmp_path: Path) -> None:
    original = model_with_vocabulary(layers=4)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            original.model.layers[2].get_submodule(name).weight.zero_()
    model = saved_model(tmp_path / "model", model=original)
    share = 1 - sum(p.numel() for p in original.model.layers[2].parameters() if p.dim() > 1) / sum(
        p.numel() for p in original.parameters()
    )
    changed = options | {"components": ["attention", "mlp"]}
    report = layer_surgery.compress(model, tmp_path / "output", target_parameters=share + 1e-6, refit=False, **changed)
    assert [layer.action for layer in report.plan.layers] == ["keep", "keep", "remove", "keep"]
    assert report.plan.parameters == report.after.parameters and report.plan.target_layers == 3
    stock, _ = load_stock(tmp_path / "output")  # a plain checkpoint
    assert float((logits(stock, IDS) - logits(original, IDS)).abs().max()) < 1e-5


def test_a_layer_that_scales_the_stream_is_not_removed(options: dict[str, Any], tmp_path: Path) -> None:
    original = model_with_vocabulary("gemma4_text", layers=4)
    layer = original.model.layers[2]
    with torch.no_grad():
        layer.layer_scalar.fill_(0.5)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            layer.get_submodule(name).weight.zero_()
    model = saved_model(tmp_path / "model", model=original)
    size = sum(p.numel() for name, p in layer.named_parameters() if "_proj" in name and p.dim() > 1)
    share = 1 - size / sum(p.numel() for p in original.parameters())
    changed = options | {"components": ["attention", "mlp"]}
    report = layer_surgery.compress(model, tmp_path / "output", target_parameters=share + 1e-6, refit=False, **changed)
    assert [each.action for each in report.plan.layers] == ["keep", "keep", "low_rank", "keep"]
    result = layer_surgery.load(tmp_path / "output")
    assert float((logits(result, IDS) - logits(original, IDS)).abs().max()) < 1e-4


def test_budgets_of_operations_and_parameters_are_met_together(model: Path, options: dict[str, Any]) -> None:
    both = {"target_flops": 0.85, "target_parameters": 0.8}
    for budgets in (both, {"target_flops": 0.85}, {"target_flops": 0.85, "layers": [1, 2, 3]}):
        report = layer_surgery.compress(model, no_save=True, refit=False, **budgets, **options)
        flops = report.after.flops_per_token / report.before.flops_per_token
        assert 0.7 < flops <= 0.85 and report.after.parameters <= report.plan.parameter_bound
        if "layers" in budgets:
            assert report.plan.layers[0].action == "keep"
        else:
            assert (report.plan.parameter_bound < report.before.parameters) == (budgets == both)


def test_a_budget_of_bytes_is_that_of_the_saved_tensors(model: Path, options: dict[str, Any], tmp_path: Path) -> None:
    size = int(0.9 * open_checkpoint(model).size_bytes)
    report = layer_surgery.compress(model, tmp_path / "output", target_size=size, refit=False, **options)
    saved = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "output").values())
    assert size - 4 * 4 * 3 * 32 < saved <= size and report.after.size_bytes == saved


def test_a_budget_of_time_finds_something_that_is_measured_to_be_faster(model: Path, options: dict[str, Any]) -> None:
    report = layer_surgery.compress(model, no_save=True, target_time=0.7, refit=False, **options)
    # Products this small take as long as their call, so what saves time is to make fewer of them.
    assert report.plan.bounds["milliseconds"] > 0 and report.plan.smaller
    assert any(rank == 0 for layer in report.plan.smaller for rank in layer.ranks.values())


def test_a_part_of_the_layers_may_be_all_that_is_cut(model: Path, options: dict[str, Any]) -> None:
    for part, linear in (("mlp", "self_attn.o_proj"), ("attention", "mlp.down_proj")):
        plan = layer_surgery.compress(
            model, no_save=True, layers=[1, 2], remove=part, keep=0.5, refit=False, **options
        ).plan
        assert {layer.index for layer in plan.smaller} == {1, 2} and plan.parameters <= plan.parameter_bound
        assert not any(linear in layer.ranks for layer in plan.layers)
        assert any(layer.channels for layer in plan.layers) == (part == "mlp")


def test_a_kind_that_no_layer_has_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    model = saved_model(tmp_path / "gpt2", model=GPT2LMHeadModel(config))
    with pytest.raises(PlanError, match="--components heads: none of the chosen layers can be cut in this way"):
        layer_surgery.compress(model, no_save=True, target_parameters=0.9, **options | {"components": ["heads"]})


def test_the_kinds_are_those_that_the_options_name() -> None:
    assert tuple(KINDS.names) == COMPONENTS and set(DEFAULT_COMPONENTS) <= set(COMPONENTS)


@pytest.mark.parametrize("together", [0.0, 0.9])
def test_errors_that_meet_count_in_the_search(
    model: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, together: float
) -> None:
    def same(_couplings: Couplings, names: list[str]) -> list[list[float]]:
        return [[1.0 if one == other else together for other in names] for one in names]

    dry: dict[str, Any] = {"no_save": True, "target_parameters": 0.8, "refit": False, **options, "eval_data": None}
    measured = layer_surgery.compress(model, **dry).plan
    monkeypatch.setattr(Couplings, "correlations", same)
    plan = layer_surgery.compress(model, **dry).plan
    assert plan.predicted_loss_rise and measured.predicted_loss_rise and plan.predicted_loss_bound is not None
    assert plan.predicted_loss_bound <= plan.predicted_loss_rise
    assert plan.predicted_loss_rise != measured.predicted_loss_rise
    if together:  # eight parts that err as one cost much more than each by itself
        assert plan.predicted_loss_rise > 2 * plan.predicted_loss_bound


def test_what_is_expected_after_a_refit_has_an_interval(whole_model: tuple[Path, SurgeryReport]) -> None:
    expected = whole_model[1].expected
    assert expected is not None and expected.low <= expected.value <= expected.high and expected.pairs == 12


Edit = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda layer: layer.update(channels=0), "0 channels; allowed: a whole number from 1 on, with reduce only"),
        (lambda layer: layer.update(channels=True), "True channels; allowed"),
        (lambda layer: layer.update(action="keep"), "action 'keep' and 8 channels"),
        (
            lambda layer: layer.update(channels=None, ranks={}),
            "action 'reduce', but neither ranks nor channels nor heads",
        ),
        (lambda layer: layer.update(heads=3), "keeps 3 heads, but its attention has 2"),
        (lambda layer: layer.update(heads=1, ranks={"self_attn.o_proj": 3}), "heads and a rank for 'self_attn.o_proj'"),
        (lambda layer: layer.update(channels=41), "keeps 41 channels, but its MLP has 40"),
        (lambda layer: layer.update(ranks={"mlp.up_proj": 3}), "channels and a rank for 'mlp.up_proj'"),
    ],
)
def test_plans_with_impossible_channels_are_refused(
    model: Path, options: dict[str, Any], edit: Edit, message: str
) -> None:
    data = {"layers": [{"index": index, "action": "keep", "ranks": {}} for index in range(4)]}
    data["layers"][2] = layer = {"index": 2, "action": "reduce", "ranks": {}, "channels": 8}
    SurgeryPlan.from_dict(json.loads(json.dumps(data)))
    edit(layer)
    with pytest.raises(PlanError, match=message):
        layer_surgery.compress(model, no_save=True, plan=data, method="mix", **options)


def test_a_plan_with_channels_asks_for_the_method_that_makes_them(model: Path, options: dict[str, Any]) -> None:
    data = {"layers": [{"index": index, "action": "keep"} for index in range(4)]}
    data["layers"][1] = {"index": 1, "action": "reduce", "channels": 8}
    with pytest.raises(PlanError, match="layers with fewer channels or heads, which --method mix makes"):
        layer_surgery.compress(model, no_save=True, plan=data, method="fisher", **options)
