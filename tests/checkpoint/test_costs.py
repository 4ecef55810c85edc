"""Costs counted without weights, against a real KV cache, real runs that torch counts, and arithmetic by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import operate
from tiny_families import DECODERS, SIX_LAYERS
from tiny_models import FIELDS, changes, make_test_plan, snapshot, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from layer_surgery.checkpoint import costs
from layer_surgery.checkpoint.costs import TokenCosts, token_costs
from layer_surgery.checkpoint.open import open_checkpoint


def model_of(model_type: str) -> PreTrainedModel:
    return tiny_model(model_type, layers=6 if model_type in SIX_LAYERS else 4, dtype=torch.float32)


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, list | tuple) else []


def real_cache_bytes(model: PreTrainedModel, length: int) -> int:
    """Return the bytes of a cache that the model has filled with weights and tokens."""
    with torch.no_grad():
        cache = model(torch.arange(3, 3 + length)[None], use_cache=True).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in tensors_in(vars(layer)))


def really_counted(model: PreTrainedModel, context: int) -> int:
    """Count the operations of one real decoding step behind `context` tokens."""
    ids = torch.randint(3, 61, (1, context + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
    return int(counter.get_total_flops())


def spelled_out(model: PreTrainedModel) -> PreTrainedModel:
    """Have attention and experts done in plain products, which are what is counted."""
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    return model


def test_every_kind_of_layers_is_tested() -> None:
    assert set(SIX_LAYERS) <= set(FIELDS)


@pytest.mark.parametrize("model_type", DECODERS)
def test_kv_cache_bytes_are_those_of_a_real_cache(model_type: str) -> None:
    model = model_of(model_type)
    expected = real_cache_bytes(model, 3) - real_cache_bytes(model, 2)
    assert token_costs(open_checkpoint(model), 4).kv_cache_bytes == expected > 0


@pytest.mark.parametrize("model_type", sorted({*DECODERS} - {"deepseek_v3"}))
@pytest.mark.parametrize("context", [3, 11])
def test_operations_are_those_of_a_real_step(model_type: str, context: int) -> None:
    model = model_of(model_type)
    found = token_costs(open_checkpoint(model), context).flops
    assert found == really_counted(spelled_out(model), context)


def test_a_model_that_cannot_have_plain_attention_is_counted_as_it_is() -> None:
    """The tiny DeepSeek has fewer KV heads than its plain attention takes."""
    checkpoint = open_checkpoint(model_of("deepseek_v3"))
    found = [token_costs(checkpoint, context).flops for context in (3, 11)]
    assert found[0] is not None and found[1] is not None and found[0] < found[1]


def test_counting_changes_nothing() -> None:
    model = model_of("gpt2")
    before = snapshot(model)
    checkpoint = open_checkpoint(model)
    token_costs(checkpoint, 4)
    assert changes(before, snapshot(model)) == []
    assert checkpoint.config.pad_token_id == 0
    assert not any(buffer.is_meta for buffer in checkpoint.skeleton.buffers())


def test_operations_of_llama_by_arithmetic() -> None:
    """2 for every weight of a linear layer, and 4 x heads x head_dim x length in every layer."""
    model = tiny_model()
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert token_costs(open_checkpoint(model), 9).flops == 2 * weights + 4 * 4 * 4 * 12 * 10


def test_a_low_rank_and_a_removed_layer_cost_what_is_left_of_them(tmp_path: Path) -> None:
    original = open_checkpoint(tiny_model())
    plan = make_test_plan(4, removed=[1], low_rank={2: {"mlp.down_proj": 3}}, method="svd")
    operated = operate(plan, original, tmp_path).checkpoint
    before, after = token_costs(original, 8), token_costs(operated, 8)
    assert before.flops is not None and before.kv_cache_bytes is not None
    whole_layer = (before.flops - 2 * 61 * 32) // 4
    assert after.flops == before.flops - whole_layer - 2 * (32 * 40 - 3 * (32 + 40))
    assert after.kv_cache_bytes == before.kv_cache_bytes * 3 // 4


def test_what_cannot_be_counted_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks_at_values(*_: Any) -> Any:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(costs, "_run", looks_at_values)
    assert token_costs(open_checkpoint(tiny_model()), 4) == TokenCosts(None, None)
