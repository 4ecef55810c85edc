"""The refit, against least squares on rows from the whole model, and on every architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from surgery_helpers import REFIT_TOKENS as TOKENS
from surgery_helpers import (
    check_resolved,
    inputs_and_outputs,
    low_rank_plan,
    new_factors,
    refitted,
    saved_result,
    tiny_bench,
)
from tiny_families import DECODERS, LAYERS, VOCABULARY, dtype_of
from tiny_models import (
    changes,
    decoder_layers,
    full_ranks,
    largest_difference,
    make_test_plan,
    packed_tokens,
    settings,
    snapshot,
    streamed,
    tiny_checkpoint,
    tiny_model,
    whole_boundaries,
)
from torch import nn
from transformers import PreTrainedModel

from layer_surgery.checkpoint.architectures import ARCHITECTURES
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import DataError
from layer_surgery.evaluation.perplexity import window_losses
from layer_surgery.linalg import decomposition
from layer_surgery.linalg.least_squares import RidgeProblem
from layer_surgery.surgeon.layer_pair import ResidualScales, residual_scales
from layer_surgery.surgeon.refit import refit
from layer_surgery.walk.walk import Walk

POST_NORM = {"gemma2", "gemma3_text", "gemma4_text", "olmo2", "olmo3", "glm4"}
families = pytest.mark.parametrize("model_type", DECODERS)


# Against rows of the whole model


def test_the_layer_before_a_removed_run_aims_past_the_run(tmp_path: Path) -> None:
    model = tiny_model(layers=5)
    result = refitted(model, make_test_plan(5, removed=[2, 3], method="remove"), tmp_path)
    name = "mlp.down_proj"
    z, output = inputs_and_outputs(model, 1, name, TOKENS)
    states = whole_boundaries(model, TOKENS)
    target = states[4] - (states[2] - output)
    weight = model.get_parameter(f"model.layers.1.{name}.weight").detach()
    check_resolved(result, (1, name), f"model.layers.1.{name}.weight", (z, target), weight)


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.up_proj"])
def test_in_a_low_rank_linear_the_left_factor_is_solved_and_the_right_one_stays(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    result = refitted(model, make_test_plan(4, low_rank={2: {name: 6}}), tmp_path, scope="operated")
    before, after = result.tensors(result.before), result.tensors(result.after)
    prefix = f"model.layers.2.{name}"
    right = before[f"{prefix}.in_factor.weight"]
    assert torch.equal(after[f"{prefix}.in_factor.weight"], right)
    if name == "mlp.up_proj":  # after the attention of the same layer, which is the original's
        assert "model.layers.2.self_attn.o_proj.weight" not in result.changed()
    x, y = inputs_and_outputs(tiny_model(), 2, name, TOKENS)
    left = f"{prefix}.out_factor.weight"
    check_resolved(result, (2, name), left, (x @ right.T, y), before[left])


def test_a_layer_behind_a_cut_brings_the_stream_back_to_the_originals(tmp_path: Path) -> None:
    """The last linear of the last layer, given all that was re-solved before it."""
    model = tiny_model(layers=3)
    result = refitted(model, make_test_plan(3, removed=[1], method="remove"), tmp_path)
    operated = tiny_model(layers=2)
    operated.load_state_dict(result.tensors(result.after))
    name = "mlp.down_proj"
    with torch.no_grad():
        decoder_layers(operated)[1].mlp.down_proj.weight.copy_(model.get_parameter(f"model.layers.2.{name}.weight"))
    z, output = inputs_and_outputs(operated, 1, name, TOKENS)
    target = whole_boundaries(model, TOKENS)[3] - (whole_boundaries(operated, TOKENS)[2] - output)
    weight = model.get_parameter(f"model.layers.2.{name}.weight").detach()
    assert result.records[-1].linear == name
    check_resolved(result, (2, name), f"model.layers.1.{name}.weight", (z, target), weight)


# Every architecture


def family_model(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type, layers=LAYERS.get(model_type, 4), dtype=dtype_of(model_type))


@families
def test_the_way_to_the_stream_is_found_or_known_not_to_be_plain_addition(tmp_path: Path, model_type: str) -> None:
    """Not plain: a norm behind the projection, experts beside the MLP, an MLP that works on a list of tokens (OPT)."""
    made = family_model(model_type)
    model, entry = streamed(made, dtype=made.dtype), ARCHITECTURES[model_type]
    found = 0
    with Walk(model, TOKENS, settings(tmp_path)) as walk:
        walk.forward(range(model.layer_count), keep=True)
        for index in range(model.layer_count):
            hidden, call = walk.boundary(index).read(slice(0, 4)), walk.rehearsal.call(index, TOKENS.token_ids[:4])
            with model.layer(index) as layer:
                modules = dict(layer.named_modules())
                out, mlp = ([name for name in names if name in modules] for names in (entry.attention, entry.mlp))
                scales = residual_scales(layer, out[-1], mlp[-1] if mlp else "", call, hidden)
            if model_type in POST_NORM | {"opt"} or any("expert" in name or "moe" in name for name in modules):
                assert scales is None
            else:
                factor = 0.6 if model_type == "granite" else 1.0
                assert scales is not None
                assert (scales.attention, scales.mlp) == pytest.approx((factor, factor), abs=1e-5)
                found += 1
    assert found or model_type in POST_NORM | {"opt", "mixtral", "gpt_oss", "granitemoehybrid"}


@families
@pytest.mark.parametrize("kind", ["low_rank", "removed"])
def test_a_refit_brings_the_stream_nearer_to_the_originals(tmp_path: Path, model_type: str, kind: str) -> None:
    model, tokens = family_model(model_type), packed_tokens(40, 12)
    count = LAYERS.get(model_type, 4)
    plan = low_rank_plan(model, 1, layer_count=count)
    if kind == "removed":
        plan = make_test_plan(count, removed=[2], method="remove")
    result = refitted(model, plan, tmp_path, tokens=tokens, dtype=model.dtype)
    before, after = result.stream_errors(tmp_path, tokens)
    assert after < before
    for record in result.records:
        assert record.error_after <= record.error_before
        assert (record.ridge is None) == (record.error_after == record.error_before)


def test_wide_linears_are_refitted_as_well_without_eigendecompositions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit from which linears are wide is lowered, so `auto` takes the leading way throughout."""
    model, plan = tiny_model(), make_test_plan(4, removed=[2], method="remove")
    exact = refitted(model, plan, tmp_path / "exact")
    monkeypatch.setattr(decomposition, "WIDE", 1)
    monkeypatch.setattr(RidgeProblem, "solve", None)  # not called
    leading = refitted(model, plan, tmp_path / "leading")
    errors = [result.stream_errors(tmp_path, TOKENS)[1] for result in (exact, leading)]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    assert len(leading.records) == len(exact.records) > 0


@pytest.mark.parametrize("removed", [[0], [0, 1], [1], [1, 2], [3], [2, 3], [0, 3], [0, 2]], ids=str)
def test_a_removed_run_anywhere_is_made_up_for(tmp_path: Path, removed: list[int]) -> None:
    result = refitted(tiny_model(), make_test_plan(4, removed=removed, method="remove"), tmp_path)
    before, after = result.stream_errors(tmp_path, TOKENS)
    assert after < 0.9 * before
    assert result.after.layer_count == 4 - len(removed)


@pytest.mark.parametrize("method", ["grasp_sequential", "fisher", "svd_llm"])
def test_a_refit_follows_every_method(tmp_path: Path, method: str) -> None:
    plan = replace(low_rank_plan(tiny_model(), 1, 2), method=method)
    result = refitted(tiny_model(), plan, tmp_path)
    before, after = result.stream_errors(tmp_path, TOKENS)
    assert after < 0.95 * before


@pytest.mark.parametrize("method", ["replaceme", "laco"])
def test_a_refit_starts_from_the_weights_that_a_method_made(tmp_path: Path, method: str) -> None:
    result = refitted(tiny_model(), make_test_plan(4, removed=[2], method=method), tmp_path)
    before, after = result.stream_errors(tmp_path, TOKENS)
    assert after < before
    # The layer in front of the run reads the original's stream, and the method changed what it gives.
    (record,) = [r for r in result.records if (r.layer, r.linear) == (1, "mlp.down_proj")]
    assert record.error_before > 0


# What it leaves alone


def test_a_model_that_is_equal_to_the_original_stays_so(tmp_path: Path) -> None:
    model = tiny_model()
    checkpoint = open_checkpoint(model)
    plan = make_test_plan(4, low_rank={1: full_ranks(checkpoint, 1)})
    result = refitted(model, plan, tmp_path)
    before, after = result.stream_errors(tmp_path, TOKENS)
    assert before < 1e-10 and after < 1e-7
    old, new = result.tensors(result.before), result.tensors(result.after)
    assert max(largest_difference(new[name], old[name]) for name in old) < 1e-6
    assert all(abs(r.error_before) < 1e-12 for r in result.records)


def test_removing_a_layer_that_does_nothing_changes_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        decoder_layers(model)[1].self_attn.o_proj.weight.zero_()
        decoder_layers(model)[1].mlp.down_proj.weight.zero_()
    result = refitted(model, make_test_plan(4, removed=[1], method="remove"), tmp_path)
    old, new = result.tensors(result.before), result.tensors(result.after)
    assert max(largest_difference(new[name], old[name]) for name in old) < 1e-6


def test_scope_operated_touches_low_rank_layers_only(tmp_path: Path) -> None:
    model = tiny_model(layers=6)
    names = ARCHITECTURES["llama"].linears
    plan = make_test_plan(6, removed=[3], low_rank={1: dict.fromkeys(names, 5)})
    result = refitted(model, plan, tmp_path, scope="operated")
    assert result.changed()
    assert all(name.startswith("model.layers.1.") and name.endswith("out_factor.weight") for name in result.changed())
    assert {record.layer for record in result.records} == {1}


def test_scope_all_leaves_what_is_before_the_first_cut_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model(layers=6)
    names = ARCHITECTURES["llama"].linears
    result = refitted(model, make_test_plan(6, low_rank={2: dict.fromkeys(names, 5)}), tmp_path)
    layers = {name.split(".")[2] for name in result.changed()}
    assert layers == {"2", "3", "4", "5"}
    assert {record.layer for record in result.records} == {2, 3, 4, 5}
    result = refitted(model, make_test_plan(6, removed=[3], method="remove"), tmp_path)
    assert {record.layer for record in result.records} == {2, 4, 5}
    assert {name.split(".")[2] for name in result.changed()} == {"2", "3", "4"}


def test_norms_biases_and_embeddings_are_never_changed(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    result = refitted(model, low_rank_plan(model, 0, 2), tmp_path)
    assert result.changed()
    assert all(name.endswith(("proj.weight", "out_factor.weight")) for name in result.changed())


def test_a_users_model_is_untouched(tmp_path: Path) -> None:
    model = tiny_model(tied=True).train()
    before = snapshot(model)
    refitted(model, low_rank_plan(model, 1), tmp_path)
    assert changes(before, snapshot(model)) == []


# What it looks at


@pytest.mark.parametrize("size", [1, 3, 40])
def test_the_batch_size_does_not_matter(tmp_path: Path, size: int) -> None:
    model = tiny_model()
    plan = make_test_plan(4, removed=[2], low_rank={1: dict.fromkeys(ARCHITECTURES["llama"].linears, 6)})
    one, other = (refitted(model, plan, tmp_path, batch_size=n, on_disk=n == 3) for n in (7, size))
    assert [(r.layer, r.linear, r.ridge) for r in one.records] == [(r.layer, r.linear, r.ridge) for r in other.records]
    expected, found = one.tensors(one.after), other.tensors(other.after)
    assert max(largest_difference(found[name], expected[name]) for name in expected) < 1e-7


def test_padding_never_enters(tmp_path: Path) -> None:
    poisoned = replace(TOKENS, token_ids=torch.where(TOKENS.valid, TOKENS.token_ids, VOCABULARY - 1))
    assert not torch.equal(poisoned.token_ids, TOKENS.token_ids)
    plan = make_test_plan(4, removed=[2], low_rank={1: {"mlp.up_proj": 6}})
    clean, other = (refitted(tiny_model(), plan, tmp_path, tokens=tokens) for tokens in (TOKENS, poisoned))
    assert [record.ridge for record in clean.records] == [record.ridge for record in other.records]
    expected, found = clean.tensors(clean.after), other.tensors(other.after)
    assert max(largest_difference(found[name], expected[name]) for name in expected) < 1e-9


def take(tokens: PackedTokens, rows: slice) -> PackedTokens:
    return replace(tokens, **{name: getattr(tokens, name)[rows] for name in ("token_ids", "loss_mask", "valid")})


def test_two_sets_of_windows_are_as_good_as_one(tmp_path: Path) -> None:
    """General text goes beside the calibration windows: as if both were one set, also in what is held out."""
    plan = make_test_plan(4, removed=[2], method="remove")
    whole = refitted(tiny_model(), plan, tmp_path)
    parts = refitted(
        tiny_model(), plan, tmp_path, tokens=take(TOKENS, slice(0, 27)), general=take(TOKENS, slice(27, 40))
    )
    assert [record.ridge for record in parts.records] == [record.ridge for record in whole.records]
    expected, found = whole.tensors(whole.after), parts.tensors(parts.after)
    assert max(largest_difference(found[name], expected[name]) for name in expected) < 1e-7


@pytest.mark.parametrize(("windows", "enough"), [(3, False), (4, True), (8, True)])
def test_too_few_windows_are_refused(tmp_path: Path, windows: int, enough: bool) -> None:
    plan, tokens = make_test_plan(4, removed=[2], method="remove"), packed_tokens(windows, 12)
    if not enough:
        with pytest.raises(DataError, match=r"at least 4 calibration sequences.*there are 3; raise --samples"):
            refitted(tiny_model(), plan, tmp_path, tokens=tokens)
        return
    records = refitted(tiny_model(), plan, tmp_path, tokens=tokens).records
    assert all(record.error_after <= record.error_before for record in records)


# Memory, precision, other inputs


def test_one_layer_of_each_model_has_weights_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[int, int]] = []

    def count(*_: object) -> None:
        models = [original, operated]
        found = [sum(not any(p.is_meta for p in layer.parameters()) for layer in model.layers) for model in models]
        loaded.append((found[0], found[1]))

    path = tiny_checkpoint(tmp_path, max_shard_size="30KB")
    checkpoint = open_checkpoint(path)
    plan = make_test_plan(4, removed=[1], method="remove")
    original = streamed(checkpoint, resident_bytes=0)
    operated = streamed(result_checkpoint(checkpoint, plan), resident_bytes=0)
    for layer in [*original.layers, *operated.layers]:
        layer.register_forward_pre_hook(count)
    with Walk(original, TOKENS, settings(tmp_path, boundary_memory_bytes=0)) as walk:
        refit(plan, [walk], operated, new_factors(tmp_path, checkpoint.dtype), "all")
    assert set(loaded) == {(1, 0), (1, 1)}


def test_the_result_is_the_same_bit_for_bit_the_second_time(tmp_path: Path) -> None:
    plan = low_rank_plan(tiny_model(), 1, 2)
    first, second = (refitted(tiny_model(), plan, tmp_path) for _ in range(2))
    assert first.records == second.records
    expected, found = first.tensors(first.after), second.tensors(second.after)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_refit_in_bfloat16_is_nearly_as_good_as_in_float32(tmp_path: Path, stored: torch.dtype) -> None:
    plan = low_rank_plan(tiny_model(), 1, 2)
    tokens = packed_tokens(40, 12)
    path = tiny_checkpoint(tmp_path, tiny_model(dtype=stored))
    short, long = (refitted(path, plan, tmp_path, tokens=tokens, dtype=t) for t in (torch.bfloat16, torch.float32))
    before, after = short.stream_errors(tmp_path, tokens)
    assert after < 0.8 * before
    assert after < 1.1 * long.stream_errors(tmp_path, tokens)[1]


def small_changes(model: PreTrainedModel, factor: float = 0.05) -> PreTrainedModel:
    """Make what layers add to the stream small, as in deep models."""
    with torch.no_grad():
        for layer in decoder_layers(model):
            for name, weight in layer.named_parameters():
                if name.startswith("post_") and "attention_layernorm" not in name.replace("post_attention", ""):
                    continue
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(factor)
    return model


def scales_in(model: PreTrainedModel, dtype: torch.dtype, scratch: Path) -> list[ResidualScales | None]:
    streaming, found = streamed(model, dtype=dtype), []
    with Walk(streaming, TOKENS, settings(scratch)) as walk:
        walk.forward(range(streaming.layer_count), keep=True)
        for index in range(streaming.layer_count):
            hidden = walk.boundary(index).read(slice(0, 8))
            call = walk.rehearsal.call(index, TOKENS.token_ids[:8])
            with streaming.layer(index) as layer:
                found.append(residual_scales(layer, "self_attn.o_proj", "mlp.down_proj", call, hidden))
    return found


@pytest.mark.parametrize("factor", [0.3, 0.1, 0.05])
def test_small_changes_of_a_rounded_stream_are_still_seen_as_plain_addition(tmp_path: Path, factor: float) -> None:
    model = small_changes(tiny_model(dtype=torch.bfloat16), factor)
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight.mul_(5)
    for scales in scales_in(model, torch.bfloat16, tmp_path):
        assert scales is not None
        assert (scales.attention, scales.mlp) == pytest.approx((1, 1), abs=0.05)


@pytest.mark.parametrize("model_type", sorted(POST_NORM - {"glm4"}))
def test_a_norm_in_between_is_seen_in_a_rounded_stream_too(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in decoder_layers(model):
            for name, weight in layer.named_parameters():
                if name.startswith("post_feedforward"):
                    weight.mul_(0.2)
    assert scales_in(model, torch.bfloat16, tmp_path) == [None] * 4


def test_a_checkpoint_that_is_low_rank_already_is_refitted_again(tmp_path: Path) -> None:
    model = tiny_model()
    saved_result(low_rank_plan(model, 1), open_checkpoint(model), tmp_path / "saved")
    result = refitted(tmp_path / "saved", make_test_plan(4, removed=[2], method="remove"), tmp_path)
    before, after = result.stream_errors(tmp_path, TOKENS)
    assert after < 0.9 * before
    assert {name.split(".")[2] for name in result.changed()} == {"1", "2"}
    assert "model.layers.1.mlp.down_proj.out_factor.weight" in result.changed()
    assert "model.layers.1.mlp.down_proj.in_factor.weight" not in result.changed()


def test_a_layer_of_which_some_linears_stay_dense_is_refitted(tmp_path: Path) -> None:
    """Queries are low-rank and keys are not, although both read the same input."""
    plan = make_test_plan(4, low_rank={1: {"self_attn.q_proj": 4, "mlp.gate_proj": 5}})
    result = refitted(tiny_model(), plan, tmp_path)
    before, after = result.stream_errors(tmp_path, TOKENS)
    assert after < 0.9 * before
    assert {type(m) for m in streamed(result.after).layers[1].self_attn.children()} >= {nn.Linear}


def test_what_is_expected_is_the_rise_on_the_calibration_tokens(tmp_path: Path) -> None:
    model = tiny_model()
    plan, checkpoint = low_rank_plan(model, 1), open_checkpoint(model)
    with tiny_bench(checkpoint, tmp_path, tokens=TOKENS, general=packed_tokens(8, 12)) as bench:
        result = bench.operate(plan, plan.method, "all", ranks_fixed=True)
    before, after = (
        window_losses(streamed(each), TOKENS, settings(tmp_path)).mean for each in (checkpoint, result.checkpoint)
    )
    expected = result.expected
    assert expected is not None and expected.value == pytest.approx(after - before, rel=1e-6)
    assert abs(expected.value) > 1e-4 and expected.low < expected.value < expected.high
