"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) through PEFT: put on a model, and merged at the end."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from layer_surgery.errors import UserError
from layer_surgery.healing.trainable import adapter_targets

_NAME = "healing"


def check_peft() -> None:
    """Raise `UserError` if PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("--train lora needs PEFT, which is not installed: pip install peft.") from error


def add_adapters(model: nn.Module, layers: str, rank: int) -> None:
    """Put adapters of one rank on all linears in the decoder layers, in place; everything else needs no gradient."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = adapter_targets(model, layers)
    # Scaled by 1 at every rank, so that the learning rate means the same.
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), model, adapter_name=_NAME)


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight [out, in] of every linear with an adapter, adapter added, under the name without one."""
    merged: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            layer: Any = module
            base = layer.get_base_layer().weight.detach()
            merged[f"{name}.weight"] = base.float() + layer.get_delta_weight(_NAME).detach().float()
    return merged


def plain_name(name: str) -> str:
    """Return the name that a parameter has without adapters."""
    return name.replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name is one of an adapter."""
    return f".{_NAME}." in name
