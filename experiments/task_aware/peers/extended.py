"""Models with linear maps of the residual stream between (or within) layers, which no stock architecture has.

For evaluation only: a subclass of the stock class in which a decoder layer has further weights [D, D], that hooks
apply. A map that stands before a layer is called `before`; `attention_shortcut` and `mlp_shortcut` multiply what the
layer adds its attention and its MLP to. Streams are rows: `x W^T`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from layer_surgery.checkpoint.checkpoint import Checkpoint

from .desk import Parts

BEFORE, ATTENTION_SHORTCUT, MLP_SHORTCUT = "before", "attention_shortcut", "mlp_shortcut"


def extended(checkpoint: Checkpoint, maps: Mapping[int, Sequence[str]], parts: Parts) -> Checkpoint:
    """Return the checkpoint with a model class that has these maps, by layer; its tensors are there already."""
    base = checkpoint.model_class or MODEL_FOR_CAUSAL_LM_MAPPING[type(checkpoint.config)]
    where = checkpoint.architecture.layers

    def __init__(self: Any, config: Any, *arguments: Any, **keywords: Any) -> None:
        base.__init__(self, config, *arguments, **keywords)
        layers = self.get_submodule(where)
        for index, names in maps.items():
            _attach(layers[index], names, parts, config.hidden_size)

    model_class = type(f"Extended{base.__name__}", (base,), {"__init__": __init__, "__module__": __name__})
    return replace(checkpoint, model_class=model_class)


def _attach(layer: Any, names: Sequence[str], parts: Parts, width: int) -> None:
    for name in names:
        layer.add_module(name, nn.Linear(width, width, bias=False))
    if BEFORE in names:
        layer.register_forward_pre_hook(lambda module, arguments: (module.before(arguments[0]), *arguments[1:]))
    for name, norm, part in (
        (ATTENTION_SHORTCUT, parts.attention_norm, parts.attention),
        (MLP_SHORTCUT, parts.mlp_norm, parts.mlp),
    ):
        if name in names:
            _attach_shortcut(layer, name, layer.get_submodule(norm), layer.get_submodule(part))


def _attach_shortcut(layer: Any, name: str, norm: nn.Module, part: nn.Module) -> None:
    """Have `part` add `x (W - I)^T` to what it gives, x what the norm before it reads."""
    held: dict[str, Tensor] = {}

    def take(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        held["stream"] = arguments[0]

    def add(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        stream = held.pop("stream")
        change = layer.get_submodule(name)(stream) - stream
        return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

    norm.register_forward_pre_hook(take)
    part.register_forward_hook(add)


def projection(gram: Tensor, rank: int) -> Tensor:
    """Return the projection [D, D] float64 on the leading eigenvectors of a second moment."""
    _values, vectors = torch.linalg.eigh(gram)
    leading = vectors[:, gram.shape[0] - rank :]
    return leading @ leading.T
