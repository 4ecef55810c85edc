"""What a decoder layer and its linears are called, for every supported `model_type`.

Nothing else in the package knows a module name of an architecture. Embeddings, position embeddings, masks, final norm
and head need no entry: the walk learns them by running the model itself with stubs in place of its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layer_surgery.errors import CheckpointError, nearest_name

#: Configuration fields that hold one entry per decoder layer; other list fields of that length whose name says
#: "layer" are treated the same.
PER_LAYER_FIELDS = ("layer_types", "mlp_layer_types", "no_rope_layers")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Names of the modules that surgery touches; linears are named relative to their decoder layer."""

    model_type: str
    layers: str = "model.layers"
    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a layer, in the order in which data reaches them."""
        return self.attention + self.mlp


_FUSED_QKV = ("self_attn.qkv_proj", "self_attn.o_proj")
_FUSED_GATE_UP = ("mlp.gate_up_proj", "mlp.down_proj")
_TWO_LAYER_MLP = ("mlp.c_fc", "mlp.c_proj")

#: Every entry has a contract test (tests/test_architectures.py). To add one, add a line here.
ARCHITECTURES: dict[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        Architecture(model_type="llama"),
        Architecture(model_type="mistral"),
        Architecture(model_type="qwen2"),
        Architecture(model_type="qwen3"),
        Architecture(model_type="gemma"),
        Architecture(model_type="gemma2"),
        Architecture(model_type="gemma3_text"),
        Architecture(model_type="olmo2"),
        Architecture(model_type="olmo3"),
        Architecture(model_type="granite"),
        Architecture(model_type="smollm3"),
        Architecture(model_type="stablelm"),
        Architecture(model_type="cohere"),
        Architecture(model_type="starcoder2", mlp=_TWO_LAYER_MLP),
        Architecture(model_type="phi3", attention=_FUSED_QKV, mlp=_FUSED_GATE_UP),
        Architecture(model_type="glm4", mlp=_FUSED_GATE_UP),
    )
}


def architecture_of(config: Any) -> Architecture:
    """Return the entry for a transformers configuration, or raise `CheckpointError` that lists what is supported."""
    model_type = base_model_type(config)
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"the architecture '{model_type}' is not supported.{nearest_name(model_type, ARCHITECTURES)} "
            f"Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    return ARCHITECTURES[model_type]


def base_model_type(config: Any) -> str:
    """Return the `model_type` of the stock architecture, also for a checkpoint with low-rank layers."""
    base_class = getattr(config, "base_class", None)
    return str(base_class.model_type if base_class is not None else config.model_type)


def per_layer_fields(fields: dict[str, Any], layer_count: int) -> list[str]:
    """Return the names in a configuration dictionary that hold one entry per decoder layer."""
    return [
        name
        for name, value in fields.items()
        if isinstance(value, list | tuple)
        and len(value) == layer_count
        and (name in PER_LAYER_FIELDS or "layer" in name)
    ]
