"""Tensors as checkpoints store them and as models have them: other names, experts one by one, transposed matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_helpers import saved_result
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
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from layer_surgery.checkpoint.conversion import as_in_model, as_stored
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.tensors import SafetensorsSource, TensorSource
from layer_surgery.errors import CheckpointError
from layer_surgery.runs.notes import notes_on

CPU = torch.device("cpu")
TOKENS = packed_tokens(2, 8)


def family(model_type: str, layers: int = 4, **fields: object) -> PreTrainedModel:
    return tiny_model(model_type, layers=layers, dtype=dtype_of(model_type), **fields)


def edit(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def stored(path: Path) -> SafetensorsSource:
    return SafetensorsSource(sorted(path.glob("*.safetensors")))


def without_first(path: Path, scratch: Path) -> Path:
    base = open_checkpoint(path)
    plan = make_test_plan(base.layer_count, removed=[0], method="remove")
    return saved_result(plan, base, scratch / "output", dtype=base.dtype)


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoehybrid", "gpt_neox"]
)
def test_the_model_form_is_what_transformers_loads(tmp_path: Path, model_type: str) -> None:
    layers = 6 if model_type == "granitemoehybrid" else 4
    path = tiny_checkpoint(tmp_path, family(model_type, layers), max_shard_size="20KB")
    checkpoint = open_checkpoint(path)
    expected = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert checkpoint.source.specs.keys() == expected.keys()
    read = checkpoint.source.read(expected, CPU)
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    assert all(checkpoint.source.specs[name].shape == tensor.shape for name, tensor in expected.items())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3", "granitemoehybrid", "gpt_neox", "gpt2"])
def test_there_and_back_is_what_was_stored(tmp_path: Path, model_type: str) -> None:
    path = tiny_checkpoint(tmp_path, family(model_type, 6))
    checkpoint = open_checkpoint(path)
    back = as_stored(checkpoint.source, checkpoint.skeleton)
    original = stored(path)
    assert dict(back.specs) == dict(original.specs)
    for name in original.specs:
        assert torch.equal(back.read([name], CPU)[name], original.read([name], CPU)[name]), name


def test_experts_are_read_once_when_they_are_written_one_by_one(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, family("mixtral", 2)))
    reads: list[str] = []

    class Counted:
        specs = checkpoint.source.specs

        def read(self, names: list[str], device: torch.device) -> dict[str, Tensor]:
            reads.extend(names)
            return checkpoint.source.read(names, device)

    source: TensorSource = Counted()
    back = as_stored(source, checkpoint.skeleton)
    for name in back.specs:
        back.read([name], CPU)
    assert sorted(reads) == sorted(checkpoint.source.specs)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, family("mixtral", 2))
    expert = next(name for name in stored(path).specs if ".1." in name and ".experts.2." in name)
    edit(path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != expert})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*experts"):
        open_checkpoint(path)


@pytest.mark.parametrize("other", ["experts*2.", "experts.7."])
def test_experts_whose_names_are_damaged_are_refused(tmp_path: Path, other: str) -> None:
    """transformers would stack them in the order of their names: each expert's weights at another's place."""
    path = tiny_checkpoint(tmp_path, family("mixtral", 2))
    edit(path, lambda tensors: {name.replace("experts.2.", other): tensor for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="not numbered 0 to 3"):
        open_checkpoint(path)


def test_a_checkpoint_of_the_bare_decoder_is_read(tmp_path: Path) -> None:
    """GPT-2's own files have no `transformer.` before their names, and hold masks that nobody needs."""
    model = family("gpt2", tied=True)
    path = tiny_checkpoint(tmp_path, model)

    def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        masks = {f"h.{index}.attn.bias": torch.ones(1, 1, 64, 64) for index in range(4)}
        return masks | {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}

    edit(path, bare)
    expected = whole_logits(model, TOKENS)
    assert largest_difference(walked_logits(streamed(path), TOKENS, settings(tmp_path)), expected) < 1e-9
    assert open_checkpoint(path).left_out == ()
    output = without_first(path, tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, family("gpt2", tied=True))
    edit(path, lambda tensors: tensors | {"wte.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"'transformer\.wte\.weight' and 'wte\.weight'.* are both"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("model_type", "layers", "name"),
    [
        ("qwen3_next", 4, "mtp.layers.0.mlp.experts.0.gate_proj.weight"),
        ("deepseek_v3", 4, "model.layers.4.eh_proj.weight"),
        ("deepseek_v3", 4, "model.layers.4.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_heads_that_predict_further_tokens_are_left_out_and_it_is_said(
    tmp_path: Path, model_type: str, layers: int, name: str
) -> None:
    path = tiny_checkpoint(tmp_path, family(model_type, layers))
    edit(path, lambda tensors: tensors | {name: torch.ones(3, 2)})
    checkpoint = open_checkpoint(path)
    assert checkpoint.left_out == (name,)
    notes = list(notes_on(checkpoint))
    assert len(notes) == 1
    assert name in notes[0] and "left out" in notes[0]
    output = without_first(path, tmp_path)
    assert name not in stored(output).specs
    loaded, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not getattr(loaded.config, "num_nextn_predict_layers", 0)


def test_further_layers_that_no_field_announces_are_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, family("deepseek_v3", 4, num_nextn_predict_layers=0))
    edit(path, lambda tensors: tensors | {"model.layers.4.eh_proj.weight": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match=r"does not know, the first being 'model\.layers\.4\.eh_proj\.weight'"):
        open_checkpoint(path)


def test_a_vision_tower_beside_a_language_model_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, family("qwen3_5_text", 4))
    edit(path, lambda tensors: tensors | {"model.visual.blocks.0.attn.proj.weight": torch.ones(3, 2)})
    with pytest.raises(CheckpointError, match=r"multimodal model \('model\.visual\.blocks"):
        open_checkpoint(path)


def test_what_an_architecture_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    """DeepSeek's correction of the router's scores, as `from_pretrained` keeps it."""
    model = streamed(tiny_checkpoint(tmp_path, family("deepseek_v3", 4)), dtype=torch.bfloat16)
    with model.layer(3) as layer:
        dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert dtypes.pop("mlp.gate.e_score_correction_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_names_without_a_place_are_not_converted(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, family("mixtral", 2))
    edit(path, lambda tensors: tensors | {"other.experts.0.w1.weight": torch.ones(3, 2)})
    skeleton = open_checkpoint(tiny_checkpoint(tmp_path / "whole", family("mixtral", 2))).skeleton
    source, without_place = as_in_model(stored(path), skeleton)
    assert without_place == ["other.experts.0.w1.weight"]
    assert source.specs.keys() == skeleton.state_dict().keys()
