"""Costs of a token, counted by running the model without its weights: on the meta device, where tensors have shapes
only.

So it holds for every architecture as it is (grouped queries, windows, experts, layers without attention), costs neither
memory nor time, and no formula here has to know about any of them.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from layer_surgery.checkpoint.checkpoint import Checkpoint, build_skeleton
from layer_surgery.checkpoint.heads import CAUSAL_LM

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class TokenCosts:
    """Of generating one token of one sequence. None where a model cannot be run without its weights."""

    kv_cache_bytes: int | None
    """Added by the token to the KV cache, in the checkpoint's dtype. Layers with a sliding window add something until
    the window is full; layers that keep a state of fixed size add nothing."""
    flops: int | None
    """Operations behind `context` other tokens, with a cache: 2 for every weight of a matrix that takes part (the head
    too, the embedding, a look-up, not; of experts those that are chosen), and the products of attention. Norms,
    activations and the softmax are left out, as usual (Kaplan et al., arXiv 2001.08361, table 1)."""


def token_costs(checkpoint: Checkpoint, context: int) -> TokenCosts:
    """Count what one more token behind `context` tokens costs.

    Of a model that generates nothing: what one of `context` tokens costs that are given at once (of as many
    as it takes, if that is less).
    """
    if checkpoint.head is not CAUSAL_LM:
        length = min(context, checkpoint.longest_sequence or context)
        return TokenCosts(None, _first_that_runs(checkpoint, lambda model: _flops_at_once(model, length)))
    cache_bytes = cache_bytes_by_layer(checkpoint)
    flops = _first_that_runs(checkpoint, lambda model: _flops(model, context))
    return TokenCosts(None if cache_bytes is None else sum(cache_bytes), flops)


def cache_bytes_by_layer(checkpoint: Checkpoint) -> list[int] | None:
    """Count what one more token adds to the KV cache of each layer; None where that cannot be counted."""
    both = _first_that_runs(checkpoint, lambda model: (_cache_bytes(model, 1), _cache_bytes(model, 2)))
    return None if both is None else [two - one for one, two in zip(*both, strict=True)]


@torch.no_grad()
def _first_that_runs(checkpoint: Checkpoint, count: Callable[[PreTrainedModel], T]) -> T | None:
    """Count with attention spelled out as products, else as the model has it; None if it cannot run like this."""
    for attention in ("eager", None):
        try:
            model = build_skeleton(checkpoint).to("meta")  # a configuration of its own too
            model.config.pad_token_id = None  # else GPT-2 looks for padding among the tokens
            if attention is not None:
                model.set_attn_implementation(attention)
            if model._can_set_experts_implementation():
                model.set_experts_implementation("batched_mm")  # the others look which experts are chosen
            return count(model)
        except Exception as error:  # a model may look at values, and there are none
            _LOG.debug("%s cannot be run without weights: %s", checkpoint.name, error)
    return None


def _run(model: PreTrainedModel, length: int, cache: Any = None) -> Any:
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    return model(input_ids=ids, use_cache=True, past_key_values=cache, logits_to_keep=1).past_key_values


def _cache_bytes(model: PreTrainedModel, length: int) -> list[int]:
    """Return the bytes of all tensors of the cache behind `length` tokens, layer by layer."""
    layers = [tree_leaves(vars(layer)) for layer in _run(model, length).layers]
    return [sum(tensor.nbytes for tensor in layer if isinstance(tensor, Tensor)) for layer in layers]


def _flops_at_once(model: PreTrainedModel, length: int) -> int:
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    return int(counter.get_total_flops()) // length


def _flops(model: PreTrainedModel, context: int) -> int:
    cache = _run(model, context)
    with FlopCounterMode(display=False) as counter:
        _run(model, 1, cache)
    return int(counter.get_total_flops())
