"""A model without weights: parameters on the meta device, buffers that are made and not stored in memory."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from layer_surgery.checkpoint.conversion import replace_conv1d
from layer_surgery.checkpoint.heads import Head


def make_skeleton(
    config: Any,
    model_class: type[PreTrainedModel] | None,
    head: Head,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    buffers: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """Make the model that `config` describes (of `model_class`, or of transformers' class for this head).

    `dtype` is that of computation, by default that of the configuration: some architectures keep constants in it
    (Gemma's scale of the embeddings). `buffers` take the place of freshly made non-persistent ones (rotary
    frequencies, ...) of the same dtype.
    """
    config = copy.deepcopy(config)  # transformers writes the dtype into the configuration that it is given
    dtype = dtype or config.dtype
    with torch.device("meta"):
        if model_class is None:
            auto_class = getattr(transformers, head.auto_class)
            model = auto_class.from_config(config, trust_remote_code=trust_remote_code or None, dtype=dtype)
        else:
            model = model_class._from_config(config, dtype=dtype)
    replace_conv1d(model)
    model.requires_grad_(False)
    model.eval()
    _make_buffers(model, buffers or {})
    return model


def _make_buffers(model: PreTrainedModel, given: Mapping[str, Tensor]) -> None:
    """Give the non-persistent buffers their values, as `from_pretrained` does after building on the meta device."""
    owners: dict[int, nn.Module] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner_name, _, buffer_name = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        owner.register_buffer(buffer_name, torch.empty_like(buffer, device="cpu"), persistent=False)
        owners[id(owner)] = owner
    for owner in owners.values():
        model._init_weights(owner)
    fresh = dict(model.named_non_persistent_buffers())
    for name, value in given.items():
        if fresh[name].dtype != value.dtype:
            continue  # a constant in the dtype of computation: the fresh one is not rounded to the model's
        owner_name, _, buffer_name = name.rpartition(".")
        model.get_submodule(owner_name).register_buffer(buffer_name, value.detach().clone().cpu(), persistent=False)
