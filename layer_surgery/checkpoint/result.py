"""The result of a surgery as a checkpoint of its own: tensors of the original under new names, with factors in between.

Nothing is copied or written here, so evaluating it is evaluating exactly what will be saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from transformers import AutoConfig

from layer_surgery.checkpoint.experts import experts_of
from layer_surgery.checkpoint.layer_config import surviving_fields
from layer_surgery.checkpoint.modeling_layer_surgery import LayerSurgeryConfig, model_class_for, nested_config
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.checkpoint.open import Checkpoint
from layer_surgery.checkpoint.tensors import RenamedSource, TensorSource
from layer_surgery.records import SurgeryPlan

#: What configurations call the width of an MLP.
WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


def result_checkpoint(base: Checkpoint, plan: SurgeryPlan, *stores: FactorStore) -> Checkpoint:
    """Return the checkpoint that the plan makes of `base`: layers renumbered, linears replaced, the rest as it was.

    `stores` hold factors of low-rank layers and new weights of whole ones; what is in a later one counts.
    """
    mapping: dict[str, tuple[TensorSource, str]] = {name: (base.source, name) for name in base.other_tensors()}
    low_rank: dict[str, int] = {}
    narrowed: dict[str, tuple[int, int]] = {}
    ranks = {layer.index: layer.ranks for layer in plan.low_rank}
    for new_index, old_index in enumerate(plan.surviving):
        old_prefix, new_prefix = base.layer_prefix(old_index), base.layer_prefix(new_index)
        replaced = ranks.get(old_index, {})
        for name in base.layer_tensors(old_index):
            local = name.removeprefix(old_prefix)
            if not any(local == f"{linear}.weight" for linear in replaced):
                mapping[new_prefix + local] = (base.source, name)
        for store in stores:
            source = store.source(old_index)
            mapping |= {new_prefix + local: (source, local) for local in source.specs}
        low_rank |= {new_prefix + linear: rank for linear, rank in replaced.items()}
        low_rank |= _renamed(base.low_rank, old_prefix, new_prefix)
        narrowed |= _renamed(base.narrowed, old_prefix, new_prefix)
        narrowed |= {
            new_prefix + name: size
            for name, size in _new_sizes(base, old_prefix, stores, old_index).items()
            if name not in replaced
        }
    fields = surviving_fields(base.config, base.config_fields, plan.surviving)
    if narrowed and not low_rank and (common := _common_sizes(base, plan, narrowed)):
        # All layers have the same sizes: the stock architecture says them in a few fields.
        fields, narrowed = fields | common, {}
    config, model_class = _config_and_class(base, fields, low_rank, narrowed)
    return Checkpoint(
        name=f"{base.name} after surgery",
        config=config,
        config_fields=fields,
        low_rank=low_rank,
        narrowed=narrowed,
        source=RenamedSource(mapping),
        trust_remote_code=base.trust_remote_code,
        model_class=model_class,
        directory=base.directory,
    )


T = TypeVar("T")


def _renamed(values: Mapping[str, T], old_prefix: str, new_prefix: str) -> dict[str, T]:
    """Return the entries of one layer under its new prefix."""
    return {
        new_prefix + name.removeprefix(old_prefix): value
        for name, value in values.items()
        if name.startswith(old_prefix)
    }


def _new_sizes(base: Checkpoint, prefix: str, stores: Sequence[FactorStore], index: int) -> dict[str, tuple[int, int]]:
    """Return the sizes (out, in) of the linears of a layer whose new weights are not of the old size.

    And (experts, width) of its experts, if they have new weights.
    """
    sizes, experts = {}, experts_of(base.layers[index])
    for store in stores:
        for name, spec in store.source(index).specs.items():
            old = base.source.specs.get(prefix + name)
            if name.endswith(".weight") and old is not None and len(spec.shape) == 2 and spec.shape != old.shape:
                sizes[name.removesuffix(".weight")] = (int(spec.shape[0]), int(spec.shape[1]))
            elif experts is not None and name == experts.output:
                width = int(spec.shape[1 if experts.transposed else 2])
                sizes[experts.module] = (experts.number, width)
    return sizes


def _common_sizes(base: Checkpoint, plan: SurgeryPlan, narrowed: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the fields of the configuration that say the sizes of all narrowed linears; {} if none can."""
    prefixes = [base.layer_prefix(index) for index in range(len(plan.surviving))]
    mlp, attention = base.architecture.mlp, base.architecture.attention
    found: dict[str, int] = {}
    covered: set[str] = set()
    for names, fields_of in ((mlp, _width_field), (attention, _head_fields)):
        if any(prefix + name in narrowed for prefix in prefixes for name in names):
            fields = fields_of(base, prefixes, narrowed)
            if not fields:
                return {}
            found |= fields
            covered |= {prefix + name for prefix in prefixes for name in names}
    return found if set(narrowed) <= covered else {}


def _width_field(base: Checkpoint, prefixes: Sequence[str], narrowed: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the field that says the width of all MLPs, with the new one; {} if there is none."""
    output = base.architecture.mlp[-1]
    old = {spec.shape[1] for name, spec in base.source.specs.items() if name.endswith(f".{output}.weight")}
    new = {narrowed.get(f"{prefix}{output}", (0, 0))[1] for prefix in prefixes}
    if any(experts_of(layer) is not None for layer in base.layers):
        return {}  # the same field may be the width of experts too, and these may be narrowed by themselves
    fields = [name for name in WIDTH_FIELDS if {getattr(base.config, name, None)} == old]
    return dict.fromkeys(fields, new.pop()) if len(fields) == len(new) == 1 and 0 not in new else {}


def _head_fields(base: Checkpoint, prefixes: Sequence[str], narrowed: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the fields that say how many heads all attentions have, with the new numbers; {} if they differ."""
    attention = base.architecture.attention
    sizes = {tuple(narrowed.get(prefix + name, (0, 0))[0] for name in attention[:2]) for prefix in prefixes}
    if len(attention) != 4 or len(sizes) != 1 or not hasattr(base.config, "num_key_value_heads"):
        return {}
    queries, keys = sizes.pop()
    # The module says how wide a head is; heads of the configuration may be more than a layer of the base still has.
    width = getattr(base.layers[0].get_submodule(attention[0].rpartition(".")[0]), "head_dim", None)
    if not queries or not keys or not isinstance(width, int):
        return {}
    return {
        "num_attention_heads": queries // width,
        "num_key_value_heads": keys // width,
        "head_dim": width,
    }


def _config_and_class(
    base: Checkpoint, fields: dict[str, Any], low_rank: dict[str, int], narrowed: dict[str, tuple[int, int]]
) -> tuple[Any, Any]:
    if low_rank or narrowed:
        config = LayerSurgeryConfig.from_dict(nested_config(fields, low_rank, narrowed))
        return config, model_class_for(type(config))
    base_class = getattr(base.config, "base_class", None)
    if base_class is not None:  # the last low-rank layers went
        return AutoConfig.for_model(**fields), None
    return type(base.config).from_dict(dict(fields)), base.model_class


def with_new_tensors(base: Checkpoint, new: TensorSource, name: str) -> Checkpoint:
    """Return `base` with other values for the tensors that `new` has, which are of the same shapes, under a name."""
    mapping: dict[str, tuple[TensorSource, str]] = {
        tensor: (new if tensor in new.specs else base.source, tensor) for tensor in base.source.specs
    }
    return replace(base, name=name, source=RenamedSource(mapping))
