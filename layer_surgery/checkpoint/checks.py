"""Checks of a checkpoint that is opened: a language model with a head that is known, whose tensors are whole."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layer_surgery.checkpoint.heads import CAUSAL_LM, EMBEDDING, Head, base_class_of, named_head
from layer_surgery.checkpoint.modeling_layer_surgery import QUANTISED_NAMES
from layer_surgery.checkpoint.tensors import INDEX_FILE, SINGLE_FILE, TensorSpec
from layer_surgery.disk.reading import read_json
from layer_surgery.errors import CheckpointError

#: Buffers that old checkpoints store and that follow from the configuration.
CONSTANTS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.bias|\.masked_bias|\.attention\.bias|embeddings\.position_ids)$")
#: Parts of an encoder that its other heads look at, and the one that is used does not: BERT stores them all.
OTHER_HEADS = re.compile(r"(^|\.)(pooler|seq_relationship|mask_predictions)\.")
#: Heads as transformers' models call them, which embedding models do without.
HEADS_OF_MODELS = re.compile(
    r"^(classifier|cls|decoder|discriminator_predictions|generator_lm_head|generator_predictions|head|lm_head"
    r"|lm_predictions|pre_classifier|qa_outputs|score|vocab_layer_norm|vocab_projector|vocab_transform)\."
)
#: Fields of a configuration that choose an implementation, in any spelling, and those that transformers has itself.
IMPLEMENTATIONS = {
    "attn_implementation": {"eager", "sdpa", "flex_attention"},
    "experts_implementation": {"eager", "batched_mm", "grouped_mm"},
}
_COUNT = re.compile(r"(num|n)_(?!params|parameters)")
_LAYER_COUNT = re.compile(r"(num_hidden_layers|num_layers|n_layers?|num_hidden_layer)")
#: Numbers that are no burden, whatever the tensors are.
_ALWAYS_FINE = 10_000
#: Towers of a multimodal model.
TOWERS = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|multi_modal_projector|image_\w+)\.")


def check_directory(directory: Path) -> None:
    """Refuse an adapter and a directory without a configuration."""
    adapter = directory / "adapter_config.json"
    weights = (directory / SINGLE_FILE).is_file() or (directory / INDEX_FILE).is_file()
    if adapter.is_file() and not ((directory / "config.json").is_file() and weights):
        raise CheckpointError(
            f"{directory} is a PEFT adapter{_base_of(adapter)}, not a model; merge it into its base model first: "
            "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(NEW_DIR)."
        )
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json; is it a model directory?")


def _base_of(adapter: Path) -> str:
    try:
        base = read_json(adapter).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" for {base}" if base else ""


def check_fields(fields: Mapping[str, Any], file: Path) -> None:
    """Refuse fields of a configuration that are not what every configuration has."""
    names = fields.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{file} is damaged: architectures is {names!r}; it must be a list of names.")
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{file} is damaged: {name} is {value}; it must be a finite number.")


def check_fetches_nothing(fields: Mapping[str, Any], file: Path) -> None:
    """Refuse a configuration that makes transformers fetch code from the hub and run it, or read other weights.

    transformers takes an attention or an experts implementation that it does not know by name for a kernel on the hub
    (`is_kernel`), and fetches one for some that it knows too, where the package that has them is not installed.
    """
    for name, value in _nested(fields):
        kind = next((kind for kind in IMPLEMENTATIONS if kind in name), None)
        given = [value] if isinstance(value, str) else [] if value is None else None
        if isinstance(value, dict):
            given = [each for each in value.values() if isinstance(each, str)]
        if kind is not None and (given is None or not set(given) <= IMPLEMENTATIONS[kind]):
            raise CheckpointError(
                f"{file} has {name}: {value!r}, which transformers may fetch from the hub and run; allowed: "
                f"{', '.join(sorted(IMPLEMENTATIONS[kind]))}. Remove the field, or if you trust it pass "
                "--trust-remote-code (trust_remote_code=True)."
            )
        if name == "transformers_weights" and value is not None:
            raise CheckpointError(f"{file} names other weights (transformers_weights: {value!r}); remove the field.")


def check_counts(fields: Mapping[str, Any], stored: Mapping[str, TensorSpec], file: Path) -> None:
    """Refuse numbers of layers, experts, labels and the like that the stored tensors cannot bear out.

    transformers would make as many modules, or entries of a list, before anything could be compared.
    """
    sizes = [size for spec in stored.values() for size in spec.shape]
    largest = max([len(stored), *sizes, _ALWAYS_FINE])
    for name, value in _nested(fields):
        number = type(value) is int or (isinstance(value, float) and value.is_integer())
        most = len(stored) if _LAYER_COUNT.fullmatch(name) else largest
        if number and _COUNT.match(name) and value > most:
            raise CheckpointError(
                f"{file} has {name}: {value:.15g}, but the checkpoint's {len(stored)} tensors are not enough for it; "
                "correct it, or download the checkpoint again."
            )


def _nested(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration and of all that is nested in it."""
    for name, value in fields.items():
        yield str(name), value
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield from _nested(each)


def check_not_quantised(fields: Mapping[str, Any], directory: Path) -> None:
    """Refuse a checkpoint whose configuration, or a quantiser's own file beside it, says that it is quantised."""
    given = fields.get("quantization_config")
    method = given.get("quant_method", "unknown method") if isinstance(given, dict) else given
    files = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
    method = method or next((name for file, name in files.items() if (directory / file).is_file()), None)
    if method:
        raise _quantised(str(directory), str(method))


def _quantised(where: str, method: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is quantised ({method}); operate on the unquantised checkpoint and quantise the result."
    )


def find_head(config: Any, fields: Mapping[str, Any], where: str, *, embedding: bool = False) -> Head:
    """Return the head of a model; refuse what is no language model by itself, or has none, saying what it is.

    With `embedding` it has what makes it an embedding model, whatever head its configuration names.
    """
    names = ", ".join(fields.get("architectures") or []) or "none"
    told = f"architectures: {names}, model_type: {fields['model_type']}"
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(
            f"{where} is not a causal language model but an encoder-decoder ({told}); only decoder-only language "
            "models and encoders have layers to operate on."
        )
    towers = sorted(name for name in getattr(type(config), "sub_configs", None) or {} if name != "text_config")
    if getattr(config, "text_config", None) is not None:
        raise CheckpointError(
            f"{where} is multimodal ({told}; parts: text_config, {', '.join(towers) or 'others'}), and only language "
            "models by themselves are operated on; save its language model as a checkpoint of its own, with its "
            "text_config, and give that."
        )
    if embedding and base_class_of(config) not in EMBEDDING.stock_classes:
        raise CheckpointError(
            f"{where} is no embedding model that can be operated on ({told}): transformers has no model without a "
            "head for it."
        )
    if embedding:
        return EMBEDDING
    head = named_head(config, list(fields.get("architectures") or []))
    if head is not None:
        return head
    causal = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    not_causal = names != "none" and not any(name.endswith(causal) for name in fields["architectures"])
    unknown = base_class_of(config) not in CAUSAL_LM.stock_classes and not fields.get("auto_map")
    # Encoders may be built with a language-modelling head, and then see later tokens unless they are told not to.
    encoder = getattr(config, "is_decoder", None) is False and "type_vocab_size" in config.to_dict()
    if not_causal or unknown or encoder:
        raise CheckpointError(
            f"{where} is not a causal language model ({told}), nor has it another head that there is a loss for; "
            "operated on are causal and masked language models, sequence classifiers and token classifiers "
            "(...ForCausalLM, ...ForMaskedLM, ...ForSequenceClassification, ...ForTokenClassification), and embedding "
            "models: directories of sentence-transformers, or others with --head embedding and --pooling."
        )
    return CAUSAL_LM


def check_layers_stand_alone(config: Any, where: str) -> None:
    """Refuse a model whose layers take keys and values from other layers (small Gemma 3n and 4)."""
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared:
        raise CheckpointError(
            f"{where} has layers that use the keys and values of earlier ones (num_kv_shared_layers is {shared}), so "
            f"its layers cannot be looked at or removed one by one; such models ({config.model_type}) are not "
            "supported."
        )


def check_tensors(
    skeleton: PreTrainedModel,
    stored: Mapping[str, TensorSpec],
    without_place: Iterable[str],
    *,
    where: str,
    layer_count: int,
    encoder: bool = False,
    headless: bool = False,
) -> tuple[str, ...]:
    """Compare names and shapes of tensors with those that the model has.

    Returns the names without a place in the model that transformers' class ignores on purpose and that are weights.
    """
    extra = sorted(without_place)
    quantised = next((name for name in extra if QUANTISED_NAMES.search(name)), None)
    if quantised is not None:
        raise _quantised(where, f"it has '{quantised}'")
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    tied = getattr(skeleton, "all_tied_weights_keys", {}) or {}
    missing = sorted(name for name in expected if name not in stored and name not in tied)
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of the tensors that its config.json calls for, the first being "
            f"'{missing[0]}'; is the download complete and does num_hidden_layers ({layer_count}) fit?"
        )
    for name, shape in expected.items():
        if name in stored and stored[name].shape != shape:
            raise CheckpointError(
                f"tensor '{name}' in {where} has shape {list(stored[name].shape)}, but config.json calls for "
                f"{list(shape)}; the checkpoint and its configuration do not belong together."
            )
    one_byte = next(
        (n for n in expected if n in stored and stored[n].dtype.itemsize == 1 and stored[n].dtype != torch.bool), None
    )
    if one_byte is not None:
        raise _quantised(where, f"'{one_byte}' is {str(stored[one_byte].dtype).removeprefix('torch.')}")
    others = [
        name for name in extra if (encoder and OTHER_HEADS.search(name)) or (headless and HEADS_OF_MODELS.search(name))
    ]
    return (*others, *_left_out(skeleton, [name for name in extra if name not in others], where, layer_count))


def _layer_number(skeleton: PreTrainedModel, name: str) -> int:
    """Return the number of the layer whose tensor, by its name, another layer of the model has too; else -1."""
    found = re.match(r"(.+?\.)(\d+)(\..+)", name)
    return int(found[2]) if found and f"{found[1]}0{found[3]}" in skeleton.state_dict() else -1


def _left_out(skeleton: PreTrainedModel, extra: list[str], where: str, layer_count: int) -> tuple[str, ...]:
    ignorable = list(getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or [])
    further = getattr(skeleton.config, "num_nextn_predict_layers", None) or 0
    # DeepSeek's layers that predict further tokens follow the last layer; transformers' pattern knows one depth only.
    ignorable += [rf"\.layers\.{layer_count + number}\." for number in range(further)]
    unknown = [n for n in extra if not CONSTANTS.search(n) and not any(re.search(p, n) for p in ignorable)]
    further_layer = next((n for n in unknown if _layer_number(skeleton, n) >= layer_count), None)
    if further_layer is not None:
        raise CheckpointError(
            f"{where} has weights for more layers than its config.json lists (num_hidden_layers is {layer_count}, and "
            f"there is '{further_layer}'); correct num_hidden_layers, or download the checkpoint again."
        )
    if unknown:
        raise CheckpointError(
            f"{where} has {len(unknown)} tensors that its architecture does not know, the first being '{unknown[0]}'; "
            "operating on it would lose them."
        )
    tower = next((name for name in extra if TOWERS.search(name)), None)
    if tower is not None:
        raise CheckpointError(
            f"{where} has tensors of a multimodal model ('{tower}'), which would be lost; save its language model as a "
            "checkpoint of its own and give that."
        )
    return tuple(name for name in extra if not CONSTANTS.search(name))
