"""Configuration of single layers: where it is said, and how it is cut when some layers go.

Families say it in different ways: a list with an entry for each layer, a list of layer numbers, a dictionary by layer
number, or a rule (every n-th layer, the first k). Rules do not hold for what is left, so they are written out.
"""

from collections.abc import Sequence
from typing import Any

#: Configuration fields that hold one entry per decoder layer; other list fields of that length whose name says
#: "layer" are treated the same.
PER_LAYER_FIELDS = ("layer_types", "mlp_layer_types", "no_rope_layers")
#: Fields that list the numbers of some layers.
LAYER_NUMBER_FIELDS = ("mlp_only_layers", "full_attn_idxs")
#: Numbers of additional layers that predict further tokens. transformers does not run them, and they are left out.
FURTHER_TOKEN_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


def layer_count_field(config: Any) -> str:
    """Return what the configuration class calls the number of layers in its JSON: `n_layer` for GPT-2."""
    return str((getattr(config, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers"))


def per_layer_fields(fields: dict[str, Any], layer_count: int) -> list[str]:
    """Return the names in a configuration dictionary that hold one entry per decoder layer."""
    return [
        name
        for name, value in fields.items()
        if isinstance(value, list | tuple)
        and len(value) == layer_count
        and (name in PER_LAYER_FIELDS or "layer" in name)
        and name not in LAYER_NUMBER_FIELDS
    ]


def surviving_fields(config: Any, stored: dict[str, Any], surviving: Sequence[int]) -> dict[str, Any]:
    """Return a configuration dictionary with the layer count and all that is said by layer cut to the survivors.

    Args:
        config: the transformers configuration, which knows the defaults too.
        stored: what `config.json` holds; all else in it stays as it is.
        surviving: the layers that stay, by their old numbers, in ascending order.
    """
    complete = config.to_dict()
    complete = complete.get("base_config", complete)  # a low-rank checkpoint's configuration is nested
    count_field = layer_count_field(config)
    cut: dict[str, Any] = {
        name: [complete[name][index] for index in surviving]
        for name in per_layer_fields(complete, int(config.num_hidden_layers))
    }
    new_number = {old: new for new, old in enumerate(surviving)}
    for name in LAYER_NUMBER_FIELDS:
        if complete.get(name):
            cut[name] = [new_number[index] for index in complete[name] if index in new_number]
    if complete.get("per_layer_config"):
        by_number = {int(index): value for index, value in complete["per_layer_config"].items()}
        cut["per_layer_config"] = {str(new): by_number[old] for old, new in new_number.items() if old in by_number}
    if (complete.get("decoder_sparse_step") or 1) > 1:
        # Every n-th layer has experts (Qwen-MoE): the layers without are named one by one.
        step, dense = complete["decoder_sparse_step"], complete.get("mlp_only_layers") or []
        without = [new for old, new in new_number.items() if old in dense or (old + 1) % step != 0]
        cut |= {"decoder_sparse_step": 1, "mlp_only_layers": without}
    if complete.get("first_k_dense_replace"):
        cut["first_k_dense_replace"] = sum(old < complete["first_k_dense_replace"] for old in surviving)
    if complete.get("attention_types"):  # GPT-Neo: [[kinds, how often], ...], from which `attention_layers` follows
        cut["attention_types"] = [[cut["attention_layers"], 1]]
    cut |= {name: 0 for name in FURTHER_TOKEN_FIELDS if complete.get(name)}
    cut[count_field] = len(surviving)
    # Older files use a second name for some fields, which must not contradict the first.
    aliases = {alias for alias, name in (getattr(config, "attribute_map", None) or {}).items() if name in cut}
    kept = {name: value for name, value in stored.items() if name not in aliases and name != "_name_or_path"}
    return kept | cut
