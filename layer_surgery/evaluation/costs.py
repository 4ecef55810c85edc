"""What a token costs, by arithmetic on the architecture: no weight is read and nothing is run."""

from __future__ import annotations

from torch import nn

from layer_surgery.checkpoint import Checkpoint


def kv_cache_bytes_per_token(checkpoint: Checkpoint) -> int:
    """Return the bytes that one more token of one sequence adds to the KV cache, in the checkpoint's dtype.

    A key and a value of `head_dim` for every KV head of every layer. Layers with a sliding window stop growing once
    the window is full; until then this is what they add too.
    """
    config = checkpoint.config
    values = 2 * config.num_key_value_heads * _head_size(checkpoint) * checkpoint.layer_count
    return int(values * checkpoint.dtype.itemsize)


def flops_per_token(checkpoint: Checkpoint, context: int) -> int:
    """Return the floating-point operations of generating one token behind `context` tokens, with a KV cache.

    A multiplication and an addition for every weight of a linear layer, the head included and the embedding (a
    look-up) not: 2 x matmul parameters. And for attention the products of the query with every key and of the
    weights with every value: 4 x heads x head_dim x (context + 1) in each layer, where a sliding window sees no more
    than its length. Norms, activations and the softmax are left out, as usual (Kaplan et al., arXiv 2001.08361,
    table 1).
    """
    weights = sum(module.weight.numel() for module in checkpoint.skeleton.modules() if isinstance(module, nn.Linear))
    seen = sum(_seen(checkpoint, layer, context + 1) for layer in range(checkpoint.layer_count))
    return int(2 * weights + 4 * checkpoint.config.num_attention_heads * _head_size(checkpoint) * seen)


def _head_size(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _seen(checkpoint: Checkpoint, layer: int, length: int) -> int:
    """Return how many of `length` tokens a layer attends to."""
    config = checkpoint.config
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return length
    types = getattr(config, "layer_types", None)
    slides = types[layer] == "sliding_attention" if types else True
    return min(length, int(window)) if slides else length
