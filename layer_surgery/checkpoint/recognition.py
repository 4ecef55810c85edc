"""Recognise what a model's decoder layers and linears are called: from the table, or by looking at its modules."""

import re
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from layer_surgery.checkpoint.architectures import ARCHITECTURES, Architecture, base_model_type
from layer_surgery.checkpoint.heads import HEADS, base_class_of
from layer_surgery.checkpoint.modeling_layer_surgery import LowRankLinear
from layer_surgery.errors import CheckpointError, nearest_name

#: How an unknown architecture's linears are told apart by name.
_KINDS = {"attention": re.compile(r"attn|attention"), "mlp": re.compile(r"mlp|ffn|feed_forward|(^|\.)(fc|w)_?\d$")}
#: What the projection that writes to the residual stream is called, in any family.
_WRITERS = {
    names[-1].rpartition(".")[2] for entry in ARCHITECTURES.values() for names in (entry.attention, entry.mlp) if names
}
_WRITERS |= {"o_proj", "out_proj", "wo", "w2", "fc2", "proj"}


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Return the entry for a model (a skeleton will do), or a guess for a type that is not in the table.

    Raises `CheckpointError` if the type is neither listed nor built as can be guessed.
    """
    model_type = base_model_type(model.config)
    entry = ARCHITECTURES.get(model_type) if is_stock(model) else None
    if entry is not None:
        modules = dict(model.named_modules())
        # A model without a head is the body, which others have under a name.
        layers = entry.layers.removeprefix(f"{model.base_model_prefix}.") if model.base_model is model else entry.layers
        named = any(f"{layers}.0.{name}" in modules for name in entry.linears)
        if named and isinstance(modules.get(layers), nn.ModuleList):
            return entry if layers == entry.layers else replace(entry, layers=layers)
    # Not in the table; or another version of transformers, which calls its modules otherwise.
    return guess_architecture(model, model_type)


def is_stock(model: PreTrainedModel) -> bool:
    """Return whether the model is transformers' own for its configuration, and not made by code that came with it."""
    return any(base_class_of(model.config) in head.stock_classes for head in HEADS.values())


def guess_architecture(model: PreTrainedModel, model_type: str) -> Architecture:
    """Find the decoder layers of an unknown architecture: its one list of as many equal modules as it has layers.

    Linears are named only if every matrix of every layer is one that can be told to belong to attention or MLP, and
    each of the two has one that writes to the residual stream; otherwise layers can be removed and nothing else.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(part) for part in module}) == 1
    }
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise CheckpointError(
            f"the architecture '{model_type}' is not supported, and its decoder layers cannot be guessed: it has "
            f"{len(outermost)} lists of {count} equal modules where there should be one."
            f"{nearest_name(model_type, ARCHITECTURES)} Supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    layers = found[outermost[0]]
    # A low-rank checkpoint is loaded on top of a class of transformers; see modeling_layer_surgery.py.
    attention, mlp = _guess_linears(layers) if is_stock(model) else ((), ())
    return Architecture(model_type=model_type, layers=outermost[0], attention=attention, mlp=mlp, guessed=True)


def _guess_linears(layers: nn.ModuleList) -> tuple[tuple[str, ...], tuple[str, ...]]:
    groups: dict[str, dict[str, None]] = {"attention": {}, "mlp": {}}
    for layer in layers:
        linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear | LowRankLinear)}
        linears -= {f"{name}.{part}" for name in linears for part in ("in_factor", "out_factor")}
        matrices = {name for name, parameter in layer.named_parameters() if parameter.dim() > 1}
        for matrix in matrices:
            if not any(matrix.startswith(f"{name}.") for name in linears):
                return (), ()
        for name in (name for name, _ in layer.named_modules() if name in linears):
            kinds = [kind for kind, pattern in _KINDS.items() if pattern.search(name)]
            if len(kinds) != 1:
                return (), ()
            groups[kinds[0]][name] = None
    ordered = []
    for names in groups.values():
        writers = [name for name in names if name.rpartition(".")[2] in _WRITERS]
        if len(writers) != 1:
            return (), ()
        ordered.append((*(name for name in names if name not in writers), *writers))
    return ordered[0], ordered[1]
