"""The result of a surgery as a checkpoint of its own: tensors of the original under new names, with factors in between.

Nothing is copied or written here, so evaluating it is evaluating exactly what will be saved.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from layer_surgery.checkpoint.layer_config import surviving_fields
from layer_surgery.checkpoint.modeling_layer_surgery import LayerSurgeryConfig, model_class_for, nested_config
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.checkpoint.open import Checkpoint
from layer_surgery.checkpoint.tensors import RenamedSource, TensorSource
from layer_surgery.records import SurgeryPlan


def result_checkpoint(base: Checkpoint, plan: SurgeryPlan, *stores: FactorStore) -> Checkpoint:
    """Return the checkpoint that the plan makes of `base`: layers renumbered, linears replaced, the rest as it was.

    `stores` hold factors of low-rank layers and new weights of whole ones; what is in a later one counts.
    """
    mapping: dict[str, tuple[TensorSource, str]] = {name: (base.source, name) for name in base.other_tensors()}
    low_rank: dict[str, int] = {}
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
        low_rank |= {
            new_prefix + name.removeprefix(old_prefix): rank
            for name, rank in base.low_rank.items()
            if name.startswith(old_prefix)
        }
    fields = surviving_fields(base.config, base.config_fields, plan.surviving)
    config, model_class = _config_and_class(base, fields, low_rank)
    return Checkpoint(
        name=f"{base.name} after surgery",
        config=config,
        config_fields=fields,
        low_rank=low_rank,
        source=RenamedSource(mapping),
        trust_remote_code=base.trust_remote_code,
        model_class=model_class,
        directory=base.directory,
    )


def _config_and_class(base: Checkpoint, fields: dict[str, Any], low_rank: dict[str, int]) -> tuple[Any, Any]:
    if low_rank:
        config = LayerSurgeryConfig.from_dict(nested_config(fields, low_rank))
        return config, model_class_for(type(config))
    base_class = getattr(base.config, "base_class", None)
    if base_class is not None:  # the last low-rank layers went
        return AutoConfig.for_model(**fields), None
    return type(base.config).from_dict(dict(fields)), base.model_class
