"""Which fields of a configuration say the width of all MLPs, or the width or the number of all experts.

If surgery gives all layers the same sizes, these fields say them and the result is a plain checkpoint. They are found
by trying: a model is made, without weights, of a configuration with another number in one field, and what has other
sizes in it is compared with what a cut would change. So a field that says more than one thing (the width of experts and
of shared experts in DeepSeek) is not taken for one of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

from transformers import AutoConfig

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.experts import experts_of
from layer_surgery.checkpoint.skeleton import make_skeleton

_LOG = logging.getLogger(__name__)

SizedKind = Literal["channels", "experts", "routed"]
#: What configurations call the width of an MLP, that of experts, and how many experts there are.
_CANDIDATES: dict[SizedKind, tuple[str, ...]] = {
    "channels": (
        *("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim"),
        *("shared_expert_intermediate_size", "shared_intermediate_size"),
    ),
    "experts": ("moe_intermediate_size", "intermediate_size", "expert_intermediate_size"),
    "routed": ("num_local_experts", "num_experts", "n_routed_experts"),
}


def size_field(checkpoint: Checkpoint, kind: SizedKind) -> str | None:
    """Return the field that says this size of all layers and nothing else; None if there is none."""
    wanted, fields = set(_tensors(checkpoint, kind)), checkpoint.config_fields
    present = [name for name in _CANDIDATES[kind] if isinstance(getattr(checkpoint.config, name, None), int)]
    present.sort(key=lambda name: name not in fields)  # one name may stand for another (`attribute_map`)
    old = plain_shapes(checkpoint, fields) if wanted and present else {}
    for name in present if wanted else ():
        try:
            new = plain_shapes(checkpoint, {**fields, name: 2 * getattr(checkpoint.config, name)})
        except Exception as error:  # a configuration may refuse a number in a way of its own
            _LOG.debug("another %s makes no model: %s", name, error)
            continue
        if new.keys() == old.keys() and {each for each, shape in new.items() if old[each] != shape} == wanted:
            return name
    return None


def plain_kinds(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what of all layers can be cut alike so that the configuration can say it."""
    sized = [kind for kind in _CANDIDATES if size_field(checkpoint, kind) is not None]
    return (*sized, "heads")  # heads are not told by a single field: see `result_checkpoint`


def plain_config(base: Checkpoint, fields: dict[str, Any]) -> tuple[Any, Any]:
    """Return configuration and class (None: transformers' own) of a plain checkpoint of the architecture of `base`."""
    if getattr(base.config, "base_class", None) is not None:  # that of a low-rank or narrowed one is not plain
        return AutoConfig.for_model(**fields), None
    return type(base.config).from_dict(dict(fields)), base.model_class


def plain_shapes(checkpoint: Checkpoint, fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of a plain checkpoint with these fields."""
    config, model_class = plain_config(checkpoint, fields)
    skeleton = make_skeleton(config, model_class, checkpoint.head, trust_remote_code=checkpoint.trust_remote_code)
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}


def _tensors(checkpoint: Checkpoint, kind: SizedKind) -> Iterator[str]:
    """Yield the names of the parameters that a cut of this kind in all layers makes smaller."""
    for index, layer in enumerate(checkpoint.layers):
        prefix, names = checkpoint.layer_prefix(index), dict(layer.named_parameters())
        if kind == "channels":
            *feeding, output = checkpoint.architecture.mlp or ("",)
            cut = {f"{output}.weight", *(f"{name}.{part}" for name in feeding for part in ("weight", "bias"))}
        elif (experts := experts_of(layer)) is None:
            continue
        elif kind == "experts":
            cut = {f"{experts.module}.{name}" for name in experts.channel_dims}
        else:
            cut = {name for name in names if name.startswith((f"{experts.module}.", f"{experts.router or '-'}."))}
        yield from (prefix + name for name in names if name in cut)
