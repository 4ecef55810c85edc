"""The refit, against least squares on rows from the whole model, and on every architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from linalg.test_least_squares import by_rows, held_out_error
from tiny_families import LAYERS, VOCABULARY, dtype_of
from tiny_models import (
    changes,
    decoder_layers,
    full_ranks,
    hooks_on,
    largest_difference,
    make_test_plan,
    packed_tokens,
    settings,
    snapshot,
    statistics_source,
    streamed,
    tiny_checkpoint,
    tiny_model,
    whole_boundaries,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from layer_surgery.checkpoint.architectures import ARCHITECTURES
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.checkpoint.open import Checkpoint, open_checkpoint
from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import DataError
from layer_surgery.linalg.least_squares import RIDGES
from layer_surgery.progress import no_progress
from layer_surgery.records import RefitRecord, RefitScope, SurgeryPlan
from layer_surgery.surgeon import METHODS, SurgeryContext
from layer_surgery.surgeon.layer_pair import ResidualScales, residual_scales
from layer_surgery.surgeon.refit import refit
from layer_surgery.walk.walk import Walk

#: Enough rows to fit 40 inputs and to hold some out; padded, and with tokens that carry no loss.
TOKENS = packed_tokens(40, 12, padding=True, excluded=0.3)
POST_NORM = {"gemma2", "gemma3_text", "gemma4_text", "olmo2", "olmo3", "glm4"}
families = pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))


@dataclass
class Refitted:
    original: Checkpoint
    plan: SurgeryPlan
    before: Checkpoint
    after: Checkpoint
    records: list[RefitRecord]

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        return checkpoint.source.read(checkpoint.source.specs, torch.device("cpu"))

    def changed(self) -> set[str]:
        """Return the names, in the operated model, of the tensors that the refit changed."""
        before, after = self.tensors(self.before), self.tensors(self.after)
        assert before.keys() == after.keys()
        return {name for name in before if not torch.equal(before[name], after[name])}

    def stream_errors(self, scratch: Path, tokens: PackedTokens) -> tuple[float, float]:
        """Return how far the last hidden states are from the original's, before and after the refit."""
        target = last_states(self.original, scratch, tokens)
        norm = target.norm()
        before, after = (last_states(c, scratch, tokens) for c in (self.before, self.after))
        return float((before - target).norm() / norm), float((after - target).norm() / norm)


def last_states(checkpoint: Checkpoint, scratch: Path, tokens: PackedTokens) -> Tensor:
    dtype = torch.float32 if checkpoint.dtype == torch.float32 else torch.float64
    with Walk(streamed(checkpoint, dtype=dtype), tokens, settings(scratch)) as walk:
        slot = walk.forward(range(checkpoint.layer_count), keep=False)
        return walk.store.read(slot, slice(0, tokens.sequences))[tokens.valid]


def refitted(
    model: PreTrainedModel | Path,
    plan: SurgeryPlan,
    scratch: Path,
    *,
    tokens: PackedTokens = TOKENS,
    others: tuple[PackedTokens, ...] = (),
    scope: RefitScope = "all",
    batch_size: int = 7,
    on_disk: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Refitted:
    """Operate and refit as the pipeline does, over the same walk of the original."""
    checkpoint = open_checkpoint(model)
    stores = []
    for name in ("factors", "refitted"):
        directory = scratch / f"{name}-{len(list(scratch.iterdir()))}"
        directory.mkdir()
        stores.append(FactorStore(directory, checkpoint.dtype))
    factors, new = stores
    limit = 0 if on_disk else 1 << 29
    where = settings(scratch, batch_size=batch_size, boundary_memory_bytes=limit)
    original = streamed(checkpoint, dtype=dtype, resident_bytes=limit)
    with Walk(original, tokens, where) as walk:
        if plan.low_rank or METHODS[plan.method].removes:
            statistics = statistics_source(scratch, checkpoint.dtype)
            context = SurgeryContext(
                model=original,
                walk=walk,
                factors=factors,
                statistics=statistics,
                progress=no_progress,
                ranks_fixed=True,
            )
            METHODS[plan.method].function(plan, context)
        before = result_checkpoint(checkpoint, plan, factors)
        walks = [walk, *(Walk(original, other, where) for other in others)]
        operated = streamed(before, dtype=dtype, resident_bytes=limit)
        records = refit(plan, walks, operated, new, scope)
        assert hooks_on(operated.model) == hooks_on(original.model) == []
    return Refitted(checkpoint, plan, before, result_checkpoint(checkpoint, plan, factors, new), records)


def low_rank_plan(model: PreTrainedModel, *layers: int, rank: int = 6, layer_count: int = 4) -> SurgeryPlan:
    checkpoint = open_checkpoint(model)
    ranks = {index: {name: min(rank, most) for name, most in full_ranks(checkpoint, index).items()} for index in layers}
    return make_test_plan(layer_count, low_rank=ranks)


def inputs_and_outputs(model: PreTrainedModel, index: int, name: str, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    """Return what goes into a linear of the whole model and comes out of it, [N, S, in] and [N, S, out]."""
    seen: list[Tensor] = []
    linear = decoder_layers(model)[index].get_submodule(name)
    handle = linear.register_forward_hook(lambda _m, arguments, output: seen.extend((arguments[0], output)))
    with torch.no_grad():
        model(tokens.token_ids, use_cache=False)
    handle.remove()
    return seen[0], seen[1]


def best_by_rows(weight: Tensor, z: Tensor, y: Tensor, tokens: PackedTokens, every: int = 8) -> tuple[float, Tensor]:
    """Return the ridge that is best on every eighth window, and its solution on all windows, row by row."""
    windows = torch.arange(tokens.sequences)[:, None].expand_as(tokens.valid)
    held = tokens.valid & (windows % every == every - 1)
    train = tokens.valid & ~held
    errors = {r: held_out_error(by_rows(weight, z[train], y[train], r), z[held], y[held]) for r in RIDGES}
    ridge = min(errors, key=lambda r: errors[r])
    assert errors[ridge] < held_out_error(weight, z[held], y[held])
    return ridge, by_rows(weight, z[tokens.valid], y[tokens.valid], ridge)


# Against rows of the whole model


def test_the_layer_before_a_removed_run_aims_past_the_run(tmp_path: Path) -> None:
    model = tiny_model(layers=5)
    result = refitted(model, make_test_plan(5, removed=[2, 3], method="remove"), tmp_path)
    name = "mlp.down_proj"
    z, output = inputs_and_outputs(model, 1, name, TOKENS)
    states = whole_boundaries(model, TOKENS)
    target = states[4] - (states[2] - output)
    weight = model.get_parameter(f"model.layers.1.{name}.weight").detach()
    ridge, expected = best_by_rows(weight, z, target, TOKENS)
    (record,) = [r for r in result.records if (r.layer, r.linear) == (1, name)]
    assert record.ridge == ridge
    found = result.tensors(result.after)[f"model.layers.1.{name}.weight"]
    assert largest_difference(found, expected) < 1e-6


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.up_proj"])
def test_in_a_low_rank_linear_the_left_factor_is_solved_and_the_right_one_stays(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    result = refitted(model, make_test_plan(4, low_rank={2: {name: 6}}), tmp_path, scope="operated")
    before, after = result.tensors(result.before), result.tensors(result.after)
    prefix = f"model.layers.2.{name}"
    right = before[f"{prefix}.in_factor.weight"]
    assert torch.equal(after[f"{prefix}.in_factor.weight"], right)
    operated = tiny_model()
    if name == "mlp.up_proj":  # after the attention of the same layer, which is the original's
        assert "model.layers.2.self_attn.o_proj.weight" not in result.changed()
    x, y = inputs_and_outputs(operated, 2, name, TOKENS)
    ridge, expected = best_by_rows(before[f"{prefix}.out_factor.weight"], x @ right.T, y, TOKENS)
    (record,) = [r for r in result.records if r.linear == name]
    assert record.ridge == ridge
    assert largest_difference(after[f"{prefix}.out_factor.weight"], expected) < 1e-6


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
    ridge, expected = best_by_rows(weight, z, target, TOKENS)
    assert result.records[-1].linear == name and result.records[-1].ridge == ridge
    assert largest_difference(result.tensors(result.after)[f"model.layers.1.{name}.weight"], expected) < 1e-6


# Every architecture


def family_model(model_type: str) -> PreTrainedModel:
    fields = {"use_sliding_window": False, "no_rope_layer_interval": 4} if model_type == "smollm3" else {}
    return tiny_model(model_type, layers=LAYERS.get(model_type, 4), dtype=dtype_of(model_type), **fields)


@families
def test_the_way_to_the_stream_is_found_or_known_not_to_be_plain_addition(tmp_path: Path, model_type: str) -> None:
    """Not plain: a norm behind the projection, experts beside the MLP, an MLP that works on a list of tokens (OPT)."""
    made = family_model(model_type)
    model, entry = streamed(made, dtype=made.dtype), ARCHITECTURES[model_type]
    found = 0
    with Walk(model, TOKENS, settings(tmp_path)) as walk:
        walk.forward(range(model.layer_count), keep=True)
        for index in range(model.layer_count):
            hidden, call = walk.store.read(index, slice(0, 4)), walk.rehearsal.call(index, TOKENS.token_ids[:4])
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
        tiny_model(), plan, tmp_path, tokens=take(TOKENS, slice(0, 27)), others=(take(TOKENS, slice(27, 40)),)
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
    store = FactorStore(tmp_path, checkpoint.dtype)
    original = streamed(checkpoint, resident_bytes=0)
    operated = streamed(result_checkpoint(checkpoint, plan, store), resident_bytes=0)
    for layer in [*original.layers, *operated.layers]:
        layer.register_forward_pre_hook(count)
    (tmp_path / "new").mkdir()
    with Walk(original, TOKENS, settings(tmp_path, boundary_memory_bytes=0)) as walk:
        refit(plan, [walk], operated, FactorStore(tmp_path / "new", checkpoint.dtype), "all")
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
            hidden = walk.store.read(index, slice(0, 8))
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
    from layer_surgery.checkpoint.save import save_checkpoint

    model = tiny_model()
    first = refitted(model, low_rank_plan(model, 1), tmp_path)
    (tmp_path / "saved").mkdir()
    save_checkpoint(first.after, tmp_path / "saved", base=first.original)
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
