"""The proofs that every model gives before it is worked on, and what they find."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import dtype_of
from tiny_models import (
    largest_difference,
    make_test_plan,
    packed_tokens,
    settings,
    streamed,
    tiny_checkpoint,
    tiny_model,
    walked_logits,
    whole_logits,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

import layer_surgery
from layer_surgery.checkpoint import layer_config
from layer_surgery.checkpoint import open as opening_module
from layer_surgery.checkpoint import result as operated
from layer_surgery.checkpoint.architectures import ARCHITECTURES
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.errors import CheckpointError, PlanError
from layer_surgery.surgeon import FactorStore
from layer_surgery.walk import rehearsal
from layer_surgery.walk.rehearsal import LayerCall
from layer_surgery.walk.self_check import _difference, check_survivors, check_walk
from layer_surgery.walk.streamed import StreamedModel

#: Gemma 4 with an embedding of each token for each layer: what a layer is called with depends on the tokens.
PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 6}


def survivors_of(model: PreTrainedModel, removed: list[int], scratch: Path) -> None:
    """Check the survivors as a run does."""
    base = open_checkpoint(model)
    plan = make_test_plan(base.layer_count, removed=removed, method="remove")
    result = result_checkpoint(base, plan, FactorStore(scratch, base.dtype))
    check_survivors(streamed(base), streamed(result), plan.surviving)


# The walk beside the model's own forward pass


def test_one_layer_at_a_time_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(tiny_checkpoint(tmp_path), resident_bytes=0)
    loaded: list[int] = []
    most: list[int] = []
    layer = StreamedModel.layer

    @contextmanager
    def counted(self: StreamedModel, index: int) -> Iterator[nn.Module]:
        with layer(self, index) as module:
            loaded.append(index)
            most.append(sum(not next(m.parameters()).is_meta for m in self._layers))
            yield module

    monkeypatch.setattr(StreamedModel, "layer", counted)
    check_walk(model)
    assert loaded == [0, 1, 2, 3]
    assert set(most) == {1}


def test_a_walk_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    call = LayerCall.__call__
    monkeypatch.setattr(LayerCall, "__call__", lambda self, layer, hidden: 1.01 * call(self, layer, hidden))
    with pytest.raises(CheckpointError, match=r"does not give what the model .* \(from layer 0 on\).*'llama'"):
        check_walk(streamed(tiny_model()))


def test_a_head_that_depends_on_the_tokens_is_refused() -> None:
    model = streamed(tiny_model())
    decoder: Any = model.model.base_model
    forward = decoder.forward

    def with_tokens(input_ids: Tensor, **options: Any) -> Any:
        output = forward(input_ids=input_ids, **options)
        output.last_hidden_state = output.last_hidden_state + decoder.embed_tokens(input_ids)
        return output

    decoder.forward = with_tokens
    with pytest.raises(CheckpointError, match=r"does not give what the model itself gives \(after the last layer\)"):
        check_walk(model)


def test_layers_that_are_not_called_once_each_are_refused() -> None:
    model = streamed(tiny_model())
    model.model.config.num_hidden_layers = 3
    with pytest.raises(CheckpointError, match=r"not called once each \(3 calls of 4 layers\)"):
        check_walk(model)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    model = streamed(tiny_model())
    for layer in model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(CheckpointError, match="not a causal language model: its predictions depend on later tokens"):
        check_walk(model)


def test_layers_that_share_keys_and_values_are_refused_by_name_and_by_the_proof(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    types = ["sliding_attention", "full_attention"] * 3
    model = tiny_model("gemma4_text", layers=6, num_kv_shared_layers=2, layer_types=types)
    with pytest.raises(CheckpointError, match=r"num_kv_shared_layers is 2\).*gemma4_text"):
        open_checkpoint(model)
    monkeypatch.setattr(opening_module, "check_layers_stand_alone", lambda *_: None)
    with pytest.raises(CheckpointError, match="not supported"):
        check_walk(streamed(model))


def test_calls_that_depend_on_the_tokens_are_rehearsed_for_every_batch(tmp_path: Path) -> None:
    model, tokens = tiny_model("gemma4_text", layers=4, **PER_LAYER_INPUTS), packed_tokens(5, 12)
    check_walk(streamed(model))
    expected = whole_logits(model, tokens)
    assert largest_difference(walked_logits(streamed(model), tokens, settings(tmp_path)), expected) < 1e-9


def test_calls_that_depend_on_the_tokens_and_are_rehearsed_once_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "same_call", lambda _a, _b: True)
    with pytest.raises(CheckpointError, match="from layer 0 on"):
        check_walk(streamed(tiny_model("gemma4_text", layers=4, **PER_LAYER_INPUTS)))


@pytest.mark.parametrize("wrong", [{"layers": "model.blocks"}, {"attention": ("a",), "mlp": ("b",)}])
def test_an_entry_in_the_table_that_does_not_fit_gives_way_to_a_guess(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    """Another version of transformers may call modules otherwise."""
    right = ARCHITECTURES["llama"]
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(right, **wrong))
    assert open_checkpoint(tiny_model()).architecture == replace(right, guessed=True)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_model_that_takes_few_positions_is_checked_on_as_many(length: int) -> None:
    check_walk(streamed(tiny_model("gpt2", max_position_embeddings=length)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_of_computation_passes(dtype: torch.dtype) -> None:
    check_walk(streamed(tiny_model("gemma3_text", layers=7, dtype=dtype), dtype=dtype))


def test_every_command_proves_the_model_before_anything_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = LayerCall.__call__
    monkeypatch.setattr(LayerCall, "__call__", lambda self, layer, hidden: 1.01 * call(self, layer, hidden))
    hashed = "the checkpoint was hashed before the proof"
    monkeypatch.setattr(opening_module.Checkpoint, "sha256", lambda *_: pytest.fail(hashed))
    removal: dict[str, Any] = {"layers": [1], "keep": 0, "eval_data": None, "refit": False}
    for run in (
        lambda: layer_surgery.compress(tiny_model(), tmp_path / "output", **removal),
        lambda: layer_surgery.score(tiny_model(), scorer="random"),
    ):
        with pytest.raises(CheckpointError, match="does not give what the model itself gives"):
            run()
    assert not (tmp_path / "output").exists()


# The layers that stay


def test_a_rule_that_the_last_layer_must_be_of_some_kind_is_found(tmp_path: Path) -> None:
    """Gemma 4's configuration makes the last layer a full-attention layer, whatever it was."""
    model = tiny_model("gemma4_text", layers=6)
    survivors_of(model, [0, 3], tmp_path)
    with pytest.raises(PlanError, match=r"layer 4 of Gemma4ForCausalLM would not stay what it is.*as layer 4"):
        survivors_of(model, [5], tmp_path)


def test_a_scale_by_the_number_of_the_layer_is_found(tmp_path: Path) -> None:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    survivors_of(model, [3], tmp_path)
    with pytest.raises(PlanError, match=r"'attn\.scaling' is"):
        survivors_of(model, [1], tmp_path)


def test_other_positions_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers are called with is compared too: here the frequencies of the rotary embedding."""
    cut = operated.surviving_fields

    def with_other_frequencies(config: Any, stored: dict[str, Any], surviving: list[int]) -> dict[str, Any]:
        return cut(config, stored, surviving) | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}

    monkeypatch.setattr(operated, "surviving_fields", with_other_frequencies)
    with pytest.raises(PlanError, match="as layer 0, it is called with another mask or other positions"):
        survivors_of(tiny_model(), [0], tmp_path)


def test_another_shape_is_found() -> None:
    before, after = nn.Module(), nn.Module()
    before.scale, after.scale = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    assert _difference(before, before, 1, 0) == ""
    assert _difference(before, after, 1, 0) == "'scale' has another shape"


def test_something_for_each_layer_outside_the_layers_is_found(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"'model\.embed_tokens_per_layer\.weight'.*--keep"):
        survivors_of(tiny_model("gemma4_text", layers=4, **PER_LAYER_INPUTS), [0], tmp_path)


@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "olmo3", "qwen2_moe", "gpt_neo", "lfm2", "smollm3", "gemma4_text"]
)
def test_a_pattern_that_is_not_cut_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """Without the knowledge in layer_config.py no pattern of layers survives."""

    def only_the_number(config: Any, stored: dict[str, Any], surviving: list[int]) -> dict[str, Any]:
        patterned = {"layer_types", "attention_types", "attention_layers", "no_rope_layers", "per_layer_config"}
        fields = {name: value for name, value in stored.items() if name not in patterned}
        if model_type == "gpt_neo":
            fields["attention_types"] = [[["global", "local"], len(surviving) // 2]]
        return fields | {layer_config.layer_count_field(config): len(surviving)}

    monkeypatch.setattr(operated, "surviving_fields", only_the_number)
    fields = {"layer_types": None, "full_attn_idxs": [2, 5]} if model_type == "lfm2" else {}
    layers = 6 if model_type in ("gpt_neo", "lfm2") else 8
    model = tiny_model(model_type, layers=layers, dtype=dtype_of(model_type), **fields)
    with pytest.raises(PlanError, match="would not stay what it is"):
        survivors_of(model, [0, 3], tmp_path)


def test_a_run_stops_before_it_computes_anything(tmp_path: Path) -> None:
    model = tiny_model("gemma4_text", layers=6)
    with pytest.raises(PlanError, match="would not stay what it is"):
        layer_surgery.compress(model, tmp_path / "output", layers=[5], keep=0, eval_data=None, refit=False)
    assert not (tmp_path / "output").exists()
