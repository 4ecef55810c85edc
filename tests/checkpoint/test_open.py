"""Opening a checkpoint: from one file, from shards and from memory it is the same model, and nothing of it changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    edit_json,
    edit_tensors,
    model_with_vocabulary,
    saved_model,
    tensors_of,
)
from tiny_models import changes, snapshot, tiny_checkpoint, tiny_model
from tiny_tokenizer import tiny_tokenizer
from transformers import LlamaModel

import layer_surgery
from layer_surgery.checkpoint.layer_config import surviving_fields
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.errors import CheckpointError

CPU = torch.device("cpu")


# One model, three places


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path) -> None:
    model = tiny_model()
    one = open_checkpoint(tiny_checkpoint(tmp_path / "one", model))
    shards = open_checkpoint(tiny_checkpoint(tmp_path / "shards", model, max_shard_size="30KB"))
    assert (len(one.files), len(shards.files)) == (1, len(list((tmp_path / "shards" / "model").glob("*.safetensors"))))
    assert len(shards.files) > 2
    assert dict(one.source.specs) == dict(shards.source.specs)
    names = list(one.source.specs)
    first, second = one.source.read(names, CPU), shards.source.read(names, CPU)
    assert all(torch.equal(first[name], second[name]) for name in names)


def test_shards_compress_to_the_same_weights_as_one_file(tmp_path: Path) -> None:
    model = model_with_vocabulary()
    results = []
    for name, size in (("one", "1GB"), ("shards", "30KB")):
        saved_model(tmp_path / name, model=model, max_shard_size=size)
        output = tmp_path / f"{name} compressed"
        layer_surgery.compress(tmp_path / name, output, layers=[1], keep=0.3, method="svd", eval_data=None)
        results.append(tensors_of(output))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", ["svd", "grasp"])
def test_a_model_in_memory_compresses_to_the_same_weights_as_from_disk(
    tmp_path: Path, text: Path, tied: bool, method: str
) -> None:
    model = model_with_vocabulary(tied=tied)
    saved_model(tmp_path / "model", model=model)
    options = {"target_layers": 2, "keep": 0.3, "method": method, "eval_data": None}
    options |= {"calibration": text, "samples": 4, "sequence_length": 16}
    layer_surgery.compress(tmp_path / "model", tmp_path / "from disk", **options)
    layer_surgery.compress(model, tmp_path / "from memory", tokenizer=tiny_tokenizer(), **options)
    disk, memory = tensors_of(tmp_path / "from disk"), tensors_of(tmp_path / "from memory")
    assert disk.keys() == memory.keys()
    assert ("lm_head.weight" in disk) is not tied
    assert all(torch.equal(disk[name], memory[name]) for name in disk)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_in_memory_is_not_changed(tmp_path: Path, text: Path, tied: bool) -> None:
    model = model_with_vocabulary(tied=tied).train()
    before = snapshot(model)
    options = {"target_layers": 2, "keep": 0.3, "method": "grasp", "tokenizer": tiny_tokenizer()}
    data = {"calibration": text, "eval_data": [text], "samples": 4, "sequence_length": 16}
    layer_surgery.compress(model, tmp_path / "output", **options, **data)
    assert changes(before, snapshot(model)) == []


def test_a_model_in_memory_saves_its_class_and_dtype_in_the_configuration(tmp_path: Path) -> None:
    model = model_with_vocabulary().to(torch.bfloat16)
    removal: dict[str, Any] = {"layers": [1], "keep": 0, "refit": False, "eval_data": None}
    layer_surgery.compress(model, tmp_path / "output", tokenizer=tiny_tokenizer(), **removal)
    loaded = layer_surgery.load(tmp_path / "output")
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert loaded.dtype == torch.bfloat16


def test_a_low_rank_model_in_memory_can_be_operated_on_again(tmp_path: Path) -> None:
    saved_model(tmp_path / "model")
    layer_surgery.compress(tmp_path / "model", tmp_path / "once", layers=[1], keep=0.3, method="svd", eval_data=None)
    model = layer_surgery.load(tmp_path / "once")
    options: dict[str, Any] = {"layers": [3], "keep": 0, "refit": False, "eval_data": None}
    report = layer_surgery.compress(model, tmp_path / "twice", tokenizer=tiny_tokenizer(), **options)
    assert layer_surgery.load(tmp_path / "twice").num_parameters() == report.plan.parameters
    layer_surgery.compress(tmp_path / "once", tmp_path / "from disk", **options)
    disk, memory = tensors_of(tmp_path / "from disk"), tensors_of(tmp_path / "twice")
    assert disk.keys() == memory.keys()
    assert all(torch.equal(disk[name], memory[name]) for name in disk)


# What a checkpoint says about itself


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parameters_are_those_of_the_model(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tied=tied)
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, model))
    assert checkpoint.parameters == model.num_parameters() == open_checkpoint(model).parameters
    assert checkpoint.size_bytes == sum(t.nbytes for t in tensors_of(tmp_path / "model").values())


def test_hash_is_of_the_weights_and_the_configuration(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    original = open_checkpoint(path).sha256()
    assert open_checkpoint(path).sha256() == original
    shutil.copytree(path, tmp_path / "copy")
    assert open_checkpoint(tmp_path / "copy").sha256() == original
    edit_json(tmp_path / "copy" / "config.json", rms_norm_eps=1e-3)
    assert open_checkpoint(tmp_path / "copy").sha256() != original
    edit_tensors(path, lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    assert open_checkpoint(path).sha256() != original


def test_hash_is_the_same_from_disk_from_shards_and_from_memory_and_follows_the_weights(tmp_path: Path) -> None:
    """A plan made for one of them must be good for the others."""
    model = tiny_model()
    original = open_checkpoint(model).sha256()
    assert open_checkpoint(model).sha256() == original
    assert open_checkpoint(tiny_checkpoint(tmp_path / "whole", model)).sha256() == original
    assert open_checkpoint(tiny_checkpoint(tmp_path / "sharded", model, max_shard_size="20KB")).sha256() == original
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    assert open_checkpoint(model).sha256() != original


def test_no_weight_is_read_by_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint(tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("layer_surgery.checkpoint.tensors.SafetensorsSource.read", fail)
    checkpoint = open_checkpoint(path)
    assert checkpoint.layer_count == 4
    assert all(parameter.is_meta for parameter in checkpoint.skeleton.parameters())


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3"])
def test_rotary_frequencies_are_those_of_a_loaded_model(tmp_path: Path, model_type: str) -> None:
    """They are in no file: whoever builds a model on the meta device has to make them."""
    model = tiny_model(model_type)
    buffers = dict(open_checkpoint(tiny_checkpoint(tmp_path, model)).skeleton.named_non_persistent_buffers())
    expected = dict(model.named_non_persistent_buffers())
    assert expected
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo3", "smollm3"])
def test_per_layer_lists_are_cut_to_the_survivors(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type, layers=6)
    base = open_checkpoint(tiny_checkpoint(tmp_path, model))
    surviving = [0, 2, 5]
    fields = surviving_fields(base.config, base.config_fields, surviving)
    assert fields["num_hidden_layers"] == 3
    for name in ("layer_types", "no_rope_layers"):
        whole = getattr(model.config, name, None)
        if whole:
            assert fields[name] == [whole[index] for index in surviving]


def test_a_pattern_of_layers_is_written_out(tmp_path: Path) -> None:
    """gemma3 can say "every n-th layer is global", which is wrong for what is left when a layer goes."""
    path = tiny_checkpoint(tmp_path, tiny_model("gemma3_text", layers=6))
    edit_json(path / "config.json", layer_types=None, sliding_window_pattern=3)
    base = open_checkpoint(path)
    whole = list(base.config.layer_types)
    assert len(set(whole)) == 2
    assert surviving_fields(base.config, base.config_fields, [1, 2, 4])["layer_types"] == [whole[1], whole[2], whole[4]]


# What is refused


@pytest.mark.parametrize(
    "name", ["nobody/has-this-model", "./nowhere", "/no/such/dir", "~/nowhere-at-all", "a/b/c", " ", "bad name!"]
)
def test_a_missing_model_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no such model: .*'{name}'"):
        open_checkpoint(name)


@pytest.mark.parametrize(("lost", "words"), [(None, ".* is missing"), (100, " is truncated")], ids=str)
def test_a_missing_and_a_truncated_shard_are_named(tmp_path: Path, lost: int | None, words: str) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="30KB")
    shard = sorted(path.glob("*.safetensors"))[1]
    if lost is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-lost])
    with pytest.raises(CheckpointError, match=f"{shard.name}{words}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"),
            r"lacks 1 of the tensors.*layers\.2\.mlp\.up_proj\.weight",
        ),
        (lambda tensors: tensors.pop("lm_head.weight"), r"lm_head\.weight"),  # it is not tied
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
            r"'model\.norm\.weight'.*has shape \[31\].*\[32\]",
        ),
        (lambda tensors: tensors.update({"model.extra.weight": torch.zeros(1)}), r"model\.extra\.weight"),
    ],
    ids=["missing", "missing head", "other shape", "unknown"],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path, edit: Any, words: str) -> None:
    path = tiny_checkpoint(tmp_path, tiny_model(tied=False))
    edit_tensors(path, edit)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (5, r"lacks 9 .*model\.layers\.4\..*num_hidden_layers \(5\)"),
        (3, r"for more layers .*is 3, and there is .model\.layers\.3\."),
    ],
)
def test_another_number_of_layers_than_in_the_weights_is_refused(tmp_path: Path, layers: int, words: str) -> None:
    path = tiny_checkpoint(tmp_path)
    edit_json(path / "config.json", num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(path)


def test_stored_rotary_frequencies_of_old_checkpoints_are_accepted(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(path, lambda tensors: tensors.update({name: torch.zeros(6)}))
    checkpoint = open_checkpoint(path)
    assert name not in checkpoint.source.specs  # it follows from the configuration
    assert not checkpoint.left_out


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="30KB")
    first, second = sorted(path.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(CheckpointError, match="is in two files"):
        open_checkpoint(path)


def test_a_model_with_tensors_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = type(tiny_model())(tiny_model().config)
    with pytest.raises(CheckpointError, match="meta device"):
        open_checkpoint(model)


def test_a_headless_model_in_memory_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is not a causal language model and has no other head"):
        open_checkpoint(LlamaModel(tiny_model("llama").config))


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="MODEL is a Linear"):
        open_checkpoint(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(("model_type", "longest"), [("llama", 64), ("gpt2", 64), ("mpt", 64), ("bloom", None)])
def test_the_longest_sequence_is_known_whatever_its_field_is_called(model_type: str, longest: int | None) -> None:
    fields = {} if longest else {"max_position_embeddings": None}  # which this family's configuration does not have
    assert open_checkpoint(tiny_model(model_type, **fields)).longest_sequence == longest
