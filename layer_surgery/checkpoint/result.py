"""The result of a surgery as a checkpoint of its own: tensors of the original under new names, with factors in between.

Nothing is copied or written here, so evaluating it is evaluating exactly what will be saved.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from layer_surgery.checkpoint.bypass import bypass_of
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.experts import Experts, experts_of
from layer_surgery.checkpoint.layer_config import surviving_fields
from layer_surgery.checkpoint.modeling_layer_surgery import (
    LayerSurgeryConfig,
    head_of,
    model_class_for,
    nested_config,
)
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.checkpoint.size_fields import SizedKind, plain_config, plain_shapes, size_field
from layer_surgery.checkpoint.tensors import RenamedSource, TensorSource
from layer_surgery.records import SurgeryPlan


def result_checkpoint(base: Checkpoint, plan: SurgeryPlan, *stores: FactorStore) -> Checkpoint:
    """Return the checkpoint that the plan makes of `base`: layers renumbered, linears replaced, the rest as it was.

    `stores` hold factors of low-rank layers and new weights of whole ones; what is in a later one counts.
    """
    mapping: dict[str, tuple[TensorSource, str]] = {name: (base.source, name) for name in base.other_tensors()}
    low_rank: dict[str, int] = {}
    narrowed: dict[str, tuple[int, int]] = {}
    ranks = {layer.index: layer.ranks for layer in plan.low_rank}
    bypasses = {layer.index: layer.bypass for layer in plan.smaller if layer.bypass is not None}
    for new_index, old_index in enumerate(plan.surviving):
        old_prefix, new_prefix = base.layer_prefix(old_index), base.layer_prefix(new_index)
        replaced = dict(ranks.get(old_index, {}))
        gone = tuple(f"{linear}.weight" for linear in replaced)
        if old_index in bypasses:
            module = _bypassed(base, old_index)
            replaced[module], gone = bypasses[old_index], (*gone, f"{module}.")
        for name in base.layer_tensors(old_index):
            local = name.removeprefix(old_prefix)
            if not any(local == each or (each.endswith(".") and local.startswith(each)) for each in gone):
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
        shapes = {name: tuple(source.specs[stored].shape) for name, (source, stored) in mapping.items()}
        if all(shapes[name] == shape for name, shape in plain_shapes(base, fields | common).items() if name in shapes):
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
        head=base.head,
        embedder=base.embedder,
        trust_remote_code=base.trust_remote_code,
        model_class=model_class,
        directory=base.directory,
    )


def _bypassed(base: Checkpoint, index: int) -> str:
    """Return the name of the MLP of a layer whose place a linear map takes."""
    found = bypass_of(base.layers[index], base.architecture)
    assert found is not None, "the plan was checked"
    return found.module


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
                sizes[experts.module] = (int(spec.shape[0]), width)
    return sizes


def _common_sizes(base: Checkpoint, plan: SurgeryPlan, narrowed: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the fields of the configuration that say the sizes of all narrowed linears; {} if none can."""
    layers = [(base.layer_prefix(new), base.layers[old]) for new, old in enumerate(plan.surviving)]
    mlp, attention = base.architecture.mlp, base.architecture.attention
    experts = {prefix: each for prefix, layer in layers if (each := experts_of(layer)) is not None}
    parts: tuple[tuple[set[str], Callable[[], dict[str, int]]], ...] = (
        ({prefix + name for prefix, _ in layers for name in mlp}, lambda: _width_field(base, layers, narrowed)),
        (
            {prefix + name for prefix, each in experts.items() for name in (each.module, each.router)},
            lambda: _expert_fields(base, experts, narrowed),
        ),
        ({prefix + name for prefix, _ in layers for name in attention}, lambda: _head_fields(base, layers, narrowed)),
    )
    found: dict[str, int] = {}
    covered: set[str] = set()
    for names, fields_of in parts:
        if names & set(narrowed):
            fields = fields_of()
            if not fields:
                return {}
            found |= fields
            covered |= names
    return found if set(narrowed) <= covered else {}


_Layers = Sequence[tuple[str, nn.Module]]
"""Layers of the original that stay, each with the prefix that its tensors have in the result."""


def _width_field(base: Checkpoint, layers: _Layers, narrowed: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the field that says the width of all MLPs, with the new one; {} if there is none."""
    output = base.architecture.mlp[-1]
    widths = {narrowed.get(f"{prefix}{output}", (0, 0))[1] for prefix, _ in layers}
    field = size_field(base, "channels") if len(widths) == 1 and 0 not in widths else None
    return {} if field is None else {field: widths.pop()}


def _expert_fields(
    base: Checkpoint, experts: Mapping[str, Experts], narrowed: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Return the fields that say how many experts all layers have and of which width, with the new ones, or {}."""
    sizes = {narrowed.get(prefix + each.module, (0, 0)) for prefix, each in experts.items()}
    olds = {(each.number, each.count) for each in experts.values()}
    if len(sizes) != 1 or len(olds) != 1:
        return {}
    kinds: tuple[SizedKind, SizedKind] = ("routed", "experts")
    fields: dict[str, int] = {}
    for kind, new, old in zip(kinds, sizes.pop(), olds.pop(), strict=True):
        if new != old:
            field = size_field(base, kind) if new else None
            if field is None:
                return {}
            fields[field] = new
    return fields


def _head_fields(base: Checkpoint, layers: _Layers, narrowed: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the fields that say how many heads all attentions have, with the new numbers; {} if they differ."""
    attention = base.architecture.attention
    sizes = {tuple(narrowed.get(prefix + name, (0, 0))[0] for name in attention[:2]) for prefix, _ in layers}
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
        return config, model_class_for(type(config), head_of(config.architectures))
    return plain_config(base, fields)


def with_new_tensors(base: Checkpoint, new: TensorSource, name: str) -> Checkpoint:
    """Return `base` with other values for the tensors that `new` has, which are of the same shapes, under a name."""
    mapping: dict[str, tuple[TensorSource, str]] = {
        tensor: (new if tensor in new.specs else base.source, tensor) for tensor in base.source.specs
    }
    return replace(base, name=name, source=RenamedSource(mapping))
