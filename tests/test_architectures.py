"""The contract of every supported architecture: a tiny random model of each goes through the tool and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    full_ranks,
    largest_difference,
    make_test_plan,
    packed_tokens,
    settings,
    statistics_source,
    streamed,
    tiny_checkpoint,
    tiny_model,
    walked_gradients,
    walked_logits,
    whole_gradients,
    without_layers,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import layer_surgery
from layer_surgery.architectures import (
    ARCHITECTURES,
    architecture_of,
    base_model_type,
    per_layer_fields,
)
from layer_surgery.checkpoint import open_checkpoint
from layer_surgery.errors import CheckpointError
from layer_surgery.operated import operated_checkpoint
from layer_surgery.saving import save_checkpoint
from layer_surgery.surgeon import METHODS, FactorStore, SurgeryContext
from layer_surgery.walk import Walk, no_progress

#: More layers where the kinds of layers follow a pattern: every kind occurs, and removal breaks the pattern.
LAYERS = {"gemma2": 6, "gemma3_text": 7, "olmo3": 8, "smollm3": 8, "qwen2": 6, "qwen3": 6}
#: Layer 0 and another, so that what is left is renumbered and does not follow the pattern.
REMOVED = [0, 3]
TOKENS = packed_tokens(3, 12)

families = pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
both_ties = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def model_of(model_type: str, tied: bool = False) -> PreTrainedModel:
    fields = {"use_sliding_window": False, "no_rope_layer_interval": 4} if model_type == "smollm3" else {}
    return tiny_model(model_type, layers=LAYERS.get(model_type, 5), tied=tied, **fields)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    return model(TOKENS.token_ids, use_cache=False).logits


def save_operated(path: Path, output: Path, plan: Any) -> Path:
    """Apply a plan with its method, save the result into `output` and return it."""
    base = open_checkpoint(path)
    scratch = output.parent / "factors"
    scratch.mkdir()
    factors, model = FactorStore(scratch, base.dtype), streamed(base)
    METHODS[plan.method].function(
        plan,
        SurgeryContext(
            model=model, walk=None, factors=factors, statistics=statistics_source(scratch), progress=no_progress
        ),
    )
    output.mkdir()
    save_checkpoint(operated_checkpoint(base, plan, factors), output, base=base)
    return output


def load_stock(directory: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    return model.eval(), info


# The contract


@families
def test_the_test_model_has_every_kind_of_layer_of_its_family(model_type: str) -> None:
    config = model_of(model_type).config
    if model_type in LAYERS:
        kinds = config.no_rope_layers if model_type == "smollm3" else config.layer_types
        assert len(set(kinds)) == 2
        survivors = [kind for index, kind in enumerate(kinds) if index not in REMOVED]
        assert survivors != kinds[: len(survivors)], "removal leaves the pattern as it was; remove other layers"
    else:
        assert len(set(getattr(config, "layer_types", None) or [""])) == 1, "add the family to LAYERS"


@families
@both_ties
def test_streamed_logits_equal_the_models_own(tmp_path: Path, model_type: str, tied: bool) -> None:
    model = model_of(model_type, tied)
    path = tiny_checkpoint(tmp_path, model, max_shard_size="60KB")
    logits = walked_logits(streamed(path, resident_bytes=0), TOKENS, settings(tmp_path))
    assert largest_difference(logits, logits_of(model)) < 1e-9


@families
def test_weight_gradients_equal_the_models_own(tmp_path: Path, model_type: str) -> None:
    model = model_of(model_type)
    expected = whole_gradients(model, TOKENS)
    with Walk(streamed(model), TOKENS, settings(tmp_path)) as walk:
        gradients = walked_gradients(walk)
    # Not the norms: some families multiply by their weights in float32, also in a float64 model.
    linears = [
        f"model.layers.{index}.{name}.weight"
        for index in range(model.config.num_hidden_layers)
        for name in ARCHITECTURES[model_type].linears
    ]
    for name in linears:
        difference = (gradients[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert float(difference) < 1e-9, name


@families
def test_the_named_linears_are_all_the_matrices_of_every_layer(model_type: str) -> None:
    model = model_of(model_type)
    architecture = architecture_of(model.config)
    layers = model.get_submodule(architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == model.config.num_hidden_layers
    for layer in layers:
        assert all(type(layer.get_submodule(name)) is nn.Linear for name in architecture.linears)
        matrices = {name for name, parameter in layer.named_parameters() if parameter.dim() >= 2}
        norms = {name for name in matrices if "norm" in name}  # cohere has a norm of its own for each head
        assert matrices - norms == {f"{name}.weight" for name in architecture.linears}


@families
@both_ties
def test_a_model_without_two_layers_loads_in_stock_transformers_and_is_the_original_without_them(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    model = model_of(model_type, tied)
    plan = make_test_plan(model.config.num_hidden_layers, removed=REMOVED, method="remove")
    output = save_operated(tiny_checkpoint(tmp_path, model), tmp_path / "output", plan)
    loaded, info = load_stock(output)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert type(loaded) is type(model)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert largest_difference(logits_of(loaded), logits_of(without_layers(model, REMOVED))) < 1e-9
    assert largest_difference(logits_of(loaded), logits_of(model)) > 1e-2, "the removed layers did nothing"


@families
def test_lists_with_an_entry_for_each_layer_are_cut_to_the_survivors(tmp_path: Path, model_type: str) -> None:
    model = model_of(model_type)
    count = model.config.num_hidden_layers
    plan = make_test_plan(count, removed=REMOVED, method="remove")
    output = save_operated(tiny_checkpoint(tmp_path, model), tmp_path / "output", plan)
    before = model.config.to_dict()
    after = json.loads((output / "config.json").read_text())
    assert after["num_hidden_layers"] == count - 2
    for name in ("layer_types", "no_rope_layers"):
        if before.get(name) is not None:
            assert after[name] == [entry for index, entry in enumerate(before[name]) if index not in REMOVED]


@families
def test_a_model_without_two_layers_generates_with_its_cache_as_without(tmp_path: Path, model_type: str) -> None:
    model = model_of(model_type)
    plan = make_test_plan(model.config.num_hidden_layers, removed=REMOVED, method="remove")
    loaded, _ = load_stock(save_operated(tiny_checkpoint(tmp_path, model), tmp_path / "output", plan))
    loaded.generation_config.eos_token_id = None
    prompt = TOKENS.token_ids[:1, :4]
    texts = [
        loaded.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=use_cache).tolist()
        for use_cache in (True, False)
    ]
    assert len(texts[0][0]) == 12
    assert texts[0] == texts[1]


@families
@both_ties
def test_full_rank_factors_reproduce_the_original_after_saving_and_loading(
    tmp_path: Path, model_type: str, tied: bool
) -> None:
    model = model_of(model_type, tied)
    path = tiny_checkpoint(tmp_path, model)
    checkpoint = open_checkpoint(path)
    plan = make_test_plan(
        checkpoint.layer_count, low_rank={index: full_ranks(checkpoint, index) for index in (1, 4)}, method="svd"
    )
    loaded = layer_surgery.load(save_operated(path, tmp_path / "output", plan)).eval()
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert not any(p.is_meta for p in loaded.parameters())
    assert largest_difference(logits_of(loaded), logits_of(model)) < 1e-9


@families
def test_low_rank_and_removed_layers_together_equal_a_model_made_by_hand(tmp_path: Path, model_type: str) -> None:
    model = model_of(model_type)
    path = tiny_checkpoint(tmp_path, model)
    ranks = dict.fromkeys(ARCHITECTURES[model_type].linears, 3)
    plan = make_test_plan(model.config.num_hidden_layers, removed=[0], low_rank={3: ranks}, method="svd")
    loaded = layer_surgery.load(save_operated(path, tmp_path / "output", plan)).eval()
    with torch.no_grad():
        for name in ranks:
            weight = model.get_submodule("model.layers")[3].get_parameter(f"{name}.weight")
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(u[:, :3] @ torch.diag(s[:3]) @ vh[:3])
    assert largest_difference(logits_of(loaded), logits_of(without_layers(model, [0]))) < 1e-9


@families
def test_a_low_rank_model_streams_as_it_loads(tmp_path: Path, model_type: str) -> None:
    model = model_of(model_type)
    ranks = dict.fromkeys(ARCHITECTURES[model_type].linears, 3)
    plan = make_test_plan(model.config.num_hidden_layers, removed=[0], low_rank={3: ranks}, method="svd")
    output = save_operated(tiny_checkpoint(tmp_path, model), tmp_path / "output", plan)
    expected = logits_of(layer_surgery.load(output).eval())
    logits = walked_logits(streamed(output, resident_bytes=0), TOKENS, settings(tmp_path))
    assert largest_difference(logits, expected) < 1e-9


@families
def test_a_checkpoint_that_leaves_out_what_follows_from_a_pattern_is_cut_rightly(
    tmp_path: Path, model_type: str
) -> None:
    """Older checkpoints do not write their per-layer lists; they follow from the number of the layer."""
    model = model_of(model_type)
    path = tiny_checkpoint(tmp_path, model)
    fields = json.loads((path / "config.json").read_text())
    for name in ("layer_types", "no_rope_layers"):
        fields.pop(name, None)
    (path / "config.json").write_text(json.dumps(fields))
    plan = make_test_plan(model.config.num_hidden_layers, removed=REMOVED, method="remove")
    loaded, _ = load_stock(save_operated(path, tmp_path / "output", plan))
    assert largest_difference(logits_of(loaded), logits_of(without_layers(model, REMOVED))) < 1e-9


# The table


def test_every_entry_is_filed_under_its_model_type() -> None:
    assert all(entry.model_type == name for name, entry in ARCHITECTURES.items())


def test_an_unknown_architecture_is_refused_with_the_nearest_and_all() -> None:
    config = LlamaConfig()
    config.model_type = "llama4"
    with pytest.raises(
        CheckpointError, match=r"'llama4' is not supported\. Did you mean 'llama'\?.*Supported: cohere,"
    ):
        architecture_of(config)


def test_a_low_rank_model_has_the_architecture_of_its_base(tmp_path: Path) -> None:
    plan = make_test_plan(4, low_rank={1: {"mlp.up_proj": 2}}, method="svd")
    output = save_operated(tiny_checkpoint(tmp_path), tmp_path / "output", plan)
    config = open_checkpoint(output).config
    assert base_model_type(config) == "llama"
    assert architecture_of(config) is ARCHITECTURES["llama"]


def test_only_lists_of_the_right_length_that_speak_of_layers_are_per_layer_fields() -> None:
    fields = {
        "layer_types": ["a", "b", "c"],
        "no_rope_layers": (1, 1, 0),
        "some_layer_sizes": [1, 2, 3],
        "layers_to_skip": [1],
        "eos_token_id": [1, 2, 3],
        "num_hidden_layers": 3,
        "layer_norm_eps": 1e-5,
    }
    assert per_layer_fields(fields, 3) == ["layer_types", "no_rope_layers", "some_layer_sizes"]
