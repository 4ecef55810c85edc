"""The streamed model: weights come when a layer is needed and go when it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    CPU,
    changes,
    decoder_layers,
    largest_difference,
    make_test_plan,
    packed_tokens,
    settings,
    snapshot,
    streamed,
    tiny_checkpoint,
    tiny_model,
    walked_logits,
    whole_logits,
)

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.checkpoint.save import save_checkpoint
from layer_surgery.checkpoint.tensors import SafetensorsSource
from layer_surgery.errors import NumericalError
from layer_surgery.linalg.low_rank import svd, truncated
from layer_surgery.surgeon import FactorStore
from layer_surgery.walk.streamed import StreamedModel

TOKENS = packed_tokens(3, 10)


def poison(directory: Path, name: str, value: float) -> None:
    """Put a non-finite value into one entry of a stored tensor."""
    (file,) = [path for path in directory.glob("*.safetensors") if name in load_file(path)]
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("shards", ["1GB", "30KB"])
def test_a_layer_has_its_weights_inside_the_block_and_none_outside(tmp_path: Path, shards: str) -> None:
    model = tiny_model()
    streaming = streamed(tiny_checkpoint(tmp_path, model, max_shard_size=shards), resident_bytes=0)
    expected = decoder_layers(model)[2].state_dict()
    with streaming.layer(2) as layer:
        given = layer.state_dict()
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
    for layer in streaming.layers:
        assert all(parameter.is_meta for parameter in layer.parameters())


def test_only_one_layer_at_a_time_has_weights_during_a_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streaming = streamed(tiny_checkpoint(tmp_path), resident_bytes=0)
    loaded: list[int] = []
    for layer in streaming.layers:
        layer.register_forward_pre_hook(
            lambda *_: loaded.append(
                sum(not any(p.is_meta for p in candidate.parameters()) for candidate in streaming.layers)
            )
        )
    walked_logits(streaming, TOKENS, settings(tmp_path))
    assert set(loaded) == {1}


@pytest.mark.parametrize(("resident_bytes", "reads"), [(0, 2), (1 << 29, 1)])
def test_layers_stay_in_memory_only_if_all_of_them_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident_bytes: int, reads: int
) -> None:
    streaming = streamed(tiny_checkpoint(tmp_path), resident_bytes=resident_bytes)
    names: list[str] = []
    read = SafetensorsSource.read

    def counted(self: SafetensorsSource, wanted: list[str], device: torch.device) -> dict[str, torch.Tensor]:
        names.extend(wanted)
        return read(self, wanted, device)

    monkeypatch.setattr(SafetensorsSource, "read", counted)
    for _ in range(2):
        with streaming.layer(1):
            pass
    assert names.count("model.layers.1.mlp.up_proj.weight") == reads


def test_layers_that_take_one_byte_too_many_do_not_stay(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    size = sum(p.numel() * 8 for p in decoder_layers(tiny_model()).parameters())
    assert streamed(path, resident_bytes=size)._resident is not None
    assert streamed(path, resident_bytes=size - 1)._resident is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_logits_equal_the_whole_models(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_model(tied=tied, dtype=dtype)
    streaming = streamed(tiny_checkpoint(tmp_path, model, max_shard_size="30KB"), dtype=dtype, resident_bytes=0)
    expected = whole_logits(model, TOKENS)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert largest_difference(walked_logits(streaming, TOKENS, settings(tmp_path)), expected) < tolerance


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    model = streamed(tiny_checkpoint(tmp_path, tiny_model(tied=True))).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_are_given_in_the_dtype_of_computation(tmp_path: Path) -> None:
    streaming = streamed(tiny_checkpoint(tmp_path, tiny_model(dtype=torch.bfloat16)), dtype=torch.float32)
    with streaming.layer(0) as layer:
        assert {p.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_are_in_the_dtype_of_computation_too(tmp_path: Path, low_rank: bool, dtype: torch.dtype) -> None:
    """Gemma's scale of the embeddings is a constant in the model's dtype; bfloat16 would round it by 1e-4."""
    path = tiny_checkpoint(tmp_path, tiny_model("gemma", dtype=torch.bfloat16))
    checkpoint = open_checkpoint(path)
    if low_rank:
        factors = FactorStore(tmp_path, torch.bfloat16)
        name = "model.layers.1.mlp.up_proj.weight"
        weight = checkpoint.source.read([name], CPU)[name]
        factors.write(1, {"mlp.up_proj": truncated(svd(weight), 2)})
        plan = make_test_plan(4, low_rank={1: {"mlp.up_proj": 2}})
        operated = result_checkpoint(checkpoint, plan, factors)
        (tmp_path / "output").mkdir()
        save_checkpoint(operated, tmp_path / "output", base=checkpoint)
        path, checkpoint = tmp_path / "output", operated
    model = layer_surgery.load(path, dtype=dtype).eval()
    expected = whole_logits(model, TOKENS)
    logits = walked_logits(streamed(checkpoint, dtype=dtype), TOKENS, settings(tmp_path))
    assert largest_difference(logits, expected) < 2e-6


def test_a_layer_is_restored_after_an_exception_inside_the_block(tmp_path: Path) -> None:
    streaming = streamed(tiny_checkpoint(tmp_path))
    with pytest.raises(AttributeError), streaming.layer(1) as layer:
        layer.requires_grad_(True)(None)  # no layer takes None
    assert all(p.is_meta and not p.requires_grad and p.grad is None for p in streaming.layers[1].parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("resident", [0, 1 << 29])
def test_a_non_finite_weight_in_a_layer_is_named(tmp_path: Path, value: float, resident: int) -> None:
    path = tiny_checkpoint(tmp_path)
    poison(path, "model.layers.2.mlp.up_proj.weight", value)
    streaming = streamed(path, resident_bytes=resident)
    with streaming.layer(1):
        pass
    with pytest.raises(NumericalError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"), streaming.layer(2):
        pass


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_non_finite_weight_outside_the_layers_is_named(tmp_path: Path, name: str) -> None:
    path = tiny_checkpoint(tmp_path)
    poison(path, name, float("nan"))
    with pytest.raises(NumericalError, match=name.replace(".", r"\.")):
        streamed(path)


def test_replacing_linears_changes_the_streamed_model_and_not_the_checkpoint(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    streaming, name = streamed(path), "mlp.up_proj"
    before = walked_logits(streaming, TOKENS, settings(tmp_path))
    weight = streaming.read_weights([f"model.layers.1.{name}.weight"])[f"model.layers.1.{name}.weight"]
    left, right = truncated(svd(weight), 2)
    factors = {f"{name}.out_factor.weight": left, f"{name}.in_factor.weight": right}
    streaming.replace(1, {name: 2}, lambda: factors)
    changed = tiny_model()
    with torch.no_grad():
        decoder_layers(changed)[1].mlp.up_proj.weight.copy_(left @ right)
        expected = changed(TOKENS.token_ids, use_cache=False).logits
    assert largest_difference(walked_logits(streaming, TOKENS, settings(tmp_path)), expected) < 1e-9
    assert torch.equal(walked_logits(streamed(path), TOKENS, settings(tmp_path)), before)


def test_a_model_in_memory_shares_its_weights_and_is_untouched(tmp_path: Path) -> None:
    model = tiny_model(tied=True).train()
    decoder_layers(model)[0].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    streaming = streamed(model)
    with streaming.layer(0) as layer:
        assert layer.mlp.up_proj.weight.data_ptr() == decoder_layers(model)[0].mlp.up_proj.weight.data_ptr()
        assert layer is not decoder_layers(model)[0]
    walked_logits(streaming, TOKENS, settings(tmp_path))
    assert changes(before, snapshot(model)) == []


def test_the_configuration_of_a_model_in_memory_keeps_its_dtype() -> None:
    model = tiny_model(dtype=torch.float64)
    streamed(model, dtype=torch.float32)
    assert model.config.dtype == torch.float64


def test_a_model_in_memory_streams_with_its_own_buffers(tmp_path: Path) -> None:
    model = tiny_model()
    model.get_submodule("model.rotary_emb").inv_freq.mul_(0.5)
    expected = whole_logits(model, TOKENS)
    assert largest_difference(walked_logits(streamed(model), TOKENS, settings(tmp_path)), expected) < 1e-12


def test_a_model_in_training_mode_is_streamed_without_dropout(tmp_path: Path) -> None:
    model = tiny_model(attention_dropout=0.5)
    expected = whole_logits(model, TOKENS)
    assert largest_difference(walked_logits(streamed(model.train()), TOKENS, settings(tmp_path)), expected) < 1e-12


def test_rotary_buffers_that_old_checkpoints_store_do_no_harm(tmp_path: Path) -> None:
    model = tiny_model()
    path = tiny_checkpoint(tmp_path, model)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    expected = whole_logits(model, TOKENS)
    assert largest_difference(walked_logits(streamed(path), TOKENS, settings(tmp_path)), expected) < 1e-12


def test_a_sharded_checkpoint_is_really_read_from_several_files(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="30KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    checkpoint = open_checkpoint(path)
    assert StreamedModel(checkpoint, device=CPU, dtype=torch.float64).layer_count == 4
