"""Costs by arithmetic against a real KV cache and against torch's own count of operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_test_plan, operate, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from layer_surgery.architectures import ARCHITECTURES
from layer_surgery.checkpoint import open_checkpoint
from layer_surgery.evaluation.costs import flops_per_token, kv_cache_bytes_per_token
from layer_surgery.operated import operated_checkpoint


def cache_bytes(model: PreTrainedModel, length: int) -> int:
    with torch.no_grad():
        cache = model(torch.arange(3, 3 + length)[None], use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_kv_cache_bytes_are_those_of_a_real_cache(model_type: str) -> None:
    model = tiny_model(model_type)
    assert kv_cache_bytes_per_token(open_checkpoint(model)) == cache_bytes(model, 3) - cache_bytes(model, 2)


def counted_flops(model: PreTrainedModel, context: int) -> int:
    """Count the operations of one decoding step behind `context` tokens, with attention in plain matrix products."""
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 61, (1, context + 1))
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True, past_key_values=DynamicCache(config=model.config)).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
    return counter.get_total_flops()


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
@pytest.mark.parametrize("context", [3, 11])
def test_flops_are_those_that_torch_counts(model_type: str, context: int) -> None:
    model = tiny_model(model_type)
    counted = counted_flops(model, context)
    expected = flops_per_token(open_checkpoint(model), context)
    # The rotary frequencies are a tiny matrix product in some architectures: at most head_dim operations a layer.
    assert expected <= counted <= expected + 200


def test_a_low_rank_and_a_removed_layer_cost_what_is_left_of_them(tmp_path: Path) -> None:
    original = open_checkpoint(tiny_model())
    ranks = {"mlp.down_proj": 3}
    plan = make_test_plan(4, removed=[1], low_rank={2: ranks}, method="svd")
    operated = operated_checkpoint(original, plan, operate(plan, original, tmp_path / "factors"))
    whole_layer = (flops_per_token(original, 8) - 2 * 61 * 32) // 4
    saved_by_rank = 2 * (32 * 40 - 3 * (32 + 40))
    assert flops_per_token(operated, 8) == flops_per_token(original, 8) - whole_layer - saved_by_rank
    assert kv_cache_bytes_per_token(operated) * 4 == kv_cache_bytes_per_token(original) * 3
