"""What other tools rely on in results: found by using them, tested here without them, at rank 1 and by default."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_checkpoints import edit_json, edit_tensors, logits, saved_model
from tiny_models import decoder_layers, full_ranks, make_test_plan, packed_tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import AutoModelForSequenceClassification as ForSequences
from transformers import AutoModelForTokenClassification as ForTokens
from transformers.cache_utils import Cache, QuantizedLayer

import layer_surgery
from layer_surgery.checkpoint import modeling_layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.errors import CheckpointError

IDS = packed_tokens(2, 14, vocabulary=300).token_ids
KINDS = ("default", "rank 1", "no attention", "narrowed")
QUANTIZATION = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}


@pytest.fixture(scope="module", autouse=True)
def _own_place_for_remote_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def results(directory: Path) -> dict[str, Path]:
    """Make one result of each kind from a tiny model."""
    original = saved_model(directory / "original", layers=4, tied=True)
    data: dict[str, Any] = {"samples": 8, "sequence_length": 32, "eval_data": None}
    ones = {index: dict.fromkeys(full_ranks(open_checkpoint(original), index), 1) for index in (0, 2)}
    plan = make_test_plan(4, removed=[1], low_rank=ones)
    layer_surgery.compress(original, directory / "default", target_layers=3, **data)
    layer_surgery.compress(original, directory / "rank 1", plan=plan, eval_data=None)
    layer_surgery.compress(original, directory / "no attention", layers=[0, 2], keep=0, remove="attention", **data)
    layer_surgery.compress(original, directory / "narrowed", target_parameters=0.8, **data)
    return {kind: directory / kind for kind in KINDS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return results(tmp_path_factory.mktemp("results"))


@pytest.fixture(params=KINDS)
def result(request: pytest.FixtureRequest, made: dict[str, Path]) -> Path:
    return made[request.param]


@pytest.fixture
def rank_1(tmp_path: Path) -> Path:
    """Return a result that a test may change."""
    return results(tmp_path)["rank 1"]


def stock(directory: Path, auto_class: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = auto_class.from_pretrained(directory, trust_remote_code=True, **options)
    return model.eval()


def test_what_is_trained_has_elements_and_a_gradient(result: Path) -> None:
    model = stock(result).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None or not parameter.numel()] == []
    assert all(not parameter.numel() for name, parameter in model.named_parameters() if name not in trained)


# The configuration


def test_the_configuration_says_what_class_the_model_has(result: Path) -> None:
    config = AutoConfig.from_pretrained(result, trust_remote_code=True)
    assert config.architectures == ["LayerSurgeryForCausalLM"]
    assert type(config).from_dict(config.to_dict()).architectures == ["LayerSurgeryForCausalLM"]
    assert open_checkpoint(result).config_fields["architectures"] == ["LlamaForCausalLM"]


def test_the_configuration_can_be_pickled(result: Path) -> None:
    for config in (layer_surgery.load(result).config, AutoConfig.from_pretrained(result, trust_remote_code=True)):
        again = pickle.loads(pickle.dumps(config))
        assert type(again) is type(config)
        assert again.to_dict() == config.to_dict()


def test_what_a_tool_adds_at_the_top_level_is_kept(rank_1: Path) -> None:
    edit_json(rank_1 / "config.json", quantization_config=QUANTIZATION, use_cache=False)
    config = AutoConfig.from_pretrained(rank_1, trust_remote_code=True)
    assert config.quantization_config == QUANTIZATION
    assert config.use_cache is False
    written = config.to_dict()
    assert written["quantization_config"] == QUANTIZATION
    assert "quantization_config" not in written["base_config"]
    with pytest.raises(CheckpointError, match="is quantised"):
        open_checkpoint(rank_1)


def test_a_quantised_result_is_refused_where_only_the_base_configuration_says_so(rank_1: Path) -> None:
    nested = json.loads((rank_1 / "config.json").read_text())["base_config"]
    edit_json(rank_1 / "config.json", base_config=nested | {"quantization_config": QUANTIZATION})
    with pytest.raises(CheckpointError, match="is quantised"):
        open_checkpoint(rank_1)


@pytest.mark.parametrize("change", [{"architectures": None}, {"narrowed": None}, {"auto_map": None}], ids=str)
def test_a_configuration_of_an_earlier_version_is_read(rank_1: Path, change: dict[str, Any]) -> None:
    expected = logits(layer_surgery.load(rank_1), IDS)
    fields = json.loads((rank_1 / "config.json").read_text())
    (rank_1 / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in change}))
    assert torch.equal(logits(layer_surgery.load(rank_1), IDS), expected)


# The tensors


def quantise_without_a_word(tensors: dict[str, Tensor]) -> None:
    """Store one weight in 8 bits with its scale, as quantisers do."""
    name = "model.layers.0.self_attn.q_proj.out_factor.weight"
    scale = tensors[name].abs().amax(dim=1, keepdim=True) / 127
    tensors[f"{name}_scale"], tensors[name] = scale, (tensors[name] / scale).round().to(torch.int8)


def lose(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.self_attn.q_proj.in_factor.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (quantise_without_a_word, r"quantised \(there is '.*out_factor.weight_scale'\)"),
        (lose, r"1 are missing \(the first is '.*in_factor.weight'\)"),
        (add, r"1 have no place in the model \(the first is '.*q_proj.weight'\)"),
    ],
    ids=["quantised", "missing", "unexpected"],
)
def test_stock_transformers_do_not_load_other_tensors_than_were_saved(rank_1: Path, edit: Any, message: str) -> None:
    edit_tensors(rank_1, edit)
    for auto_class in (AutoModelForCausalLM, transformers.AutoModel, ForSequences):
        with pytest.raises(ValueError, match=message):
            stock(rank_1, auto_class)


# vLLM


def test_arguments_of_the_model_have_no_annotations_that_vllm_takes_for_classes(result: Path) -> None:
    parameters = inspect.signature(type(stock(result)).__init__).parameters.values()
    assert all(parameter.annotation is inspect.Parameter.empty for parameter in parameters)


def test_modules_with_other_linears_have_other_classes(made: dict[str, Path]) -> None:
    """vLLM decides by one module of each class which linears of all of them it fuses."""
    layers = decoder_layers(stock(made["rank 1"]))
    low_rank, whole, other = layers[0].mlp, layers[2].mlp, layers[1].mlp
    assert len(layers) == 3
    assert type(low_rank) is type(other) and type(low_rank) is not type(whole)
    assert type(low_rank).__name__ == type(whole).__name__ and isinstance(low_rank, type(whole))
    assert len({type(layer) for layer in layers}) == 1


# transformers 4


def test_the_modelling_file_knows_the_old_name_of_the_configuration_class(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("transformers")
    old.__dict__.update({name: getattr(transformers, name) for name in ("AutoConfig", "AutoModel", "PreTrainedModel")})
    old.__dict__.update(PretrainedConfig=transformers.PreTrainedConfig, __path__=transformers.__path__)
    monkeypatch.setitem(sys.modules, "transformers", old)
    names: dict[str, Any] = {"__name__": "old"}
    exec(Path(modeling_layer_surgery.__file__).read_text(encoding="utf-8"), names)
    assert issubclass(names["LayerSurgeryConfig"], transformers.PreTrainedConfig)


# Classifiers


@pytest.mark.parametrize("auto_class", [ForSequences, ForTokens])
def test_classifiers_have_the_layers_and_a_new_head(result: Path, auto_class: Any, tmp_path: Path) -> None:
    model = stock(result, auto_class, num_labels=3)
    body = stock(result).model
    with torch.no_grad():
        assert torch.equal(model.model(IDS).last_hidden_state, body(IDS).last_hidden_state)
        scores = model(IDS).logits
    assert scores.shape == ((2, 3) if auto_class is ForSequences else (2, 14, 3))
    model.save_pretrained(tmp_path / "trained")
    again = stock(tmp_path / "trained", auto_class)
    assert again.config.architectures == [type(model).__name__]
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, scores)


def test_a_classifier_is_the_first_that_is_made_of_a_result(made: dict[str, Path]) -> None:
    """Stock classifiers ask `AutoModel`, which knows the class of the decoder only if it was told."""
    modeling_layer_surgery._model_classes.clear()
    modeling_layer_surgery._config_classes.clear()
    config = modeling_layer_surgery.LayerSurgeryConfig.from_pretrained(made["no attention"])
    name = "LayerSurgeryForSequenceClassification"
    model = modeling_layer_surgery.model_class_for(type(config), name)(config)
    hooks = [len(layer.self_attn._forward_pre_hooks) for layer in decoder_layers(model)]
    assert hooks == [1, 0, 1, 0]


def test_an_architecture_without_a_classifier_says_so(tmp_path: Path) -> None:
    original = saved_model(tmp_path / "original", "olmo2", layers=3)
    layer_surgery.compress(original, tmp_path / "out", layers=[1], keep=0.3, method="svd", eval_data=None)
    with pytest.raises(ValueError, match=r"AutoModelForTokenClassification for olmo2.*load it with AutoModelForCausal"):
        stock(tmp_path / "out", ForTokens)


# PEFT


def test_peft_adapts_all_linears(result: Path) -> None:
    model = stock(result)
    expected = logits(model, IDS)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert {name.removeprefix("model.") for name in adapted.base_model.targeted_module_names} == {
        name.removeprefix("model.") for name in linears
    }
    assert torch.equal(logits(adapted.eval(), IDS), expected)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), IDS), expected)


# Quantised caches


class GroupedLayer(QuantizedLayer):
    """A quantised layer of a cache that, like those of quanto and HQQ, divides into groups."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        assert tensor[0].numel() > 0 and tensor[0].numel() % self.q_group_size == 0
        return tensor

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


def test_a_removed_attention_goes_into_a_quantised_cache(made: dict[str, Path]) -> None:
    model = stock(made["no attention"])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(IDS[:, :8]), "do_sample": False, "max_new_tokens": 6}
    removed = [layer for layer in decoder_layers(model) if not layer.self_attn.q_proj.weight.any()]
    assert len(removed) == 2
    size = model.config.head_dim
    layers = [GroupedLayer(q_group_size=size, residual_length=2) for _ in decoder_layers(model)]
    found = model.generate(IDS[:, :8], past_key_values=Cache(layers=layers), **options)
    assert torch.equal(found, model.generate(IDS[:, :8], use_cache=False, **options))


# Quantised weights


def test_factors_of_the_smallest_ranks_are_left_alone_by_what_quantises_linears(made: dict[str, Path]) -> None:
    """At rank 1 torchao fails, and bitsandbytes gives wrong numbers."""
    torchao = pytest.importorskip("torchao.quantization")
    expected = logits(stock(made["rank 1"]), IDS)
    settings = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = stock(made["rank 1"], quantization_config=settings)
    factors = [m for n, m in model.named_modules() if n.endswith("_factor")]
    assert factors and not any(isinstance(factor, nn.Linear) for factor in factors)
    assert type(decoder_layers(model)[2].mlp.up_proj.weight.data) is not Tensor
    found = logits(model, IDS)
    assert (found - expected).norm() < 0.1 * expected.norm()
