"""Short windows side by side in one row: their places, which architectures are exact with it, and the same loss."""

from __future__ import annotations

import pytest
import torch
from healing_windows import batch_of, short_windows
from tiny_families import DECODERS, FLOAT32_INSIDE, FLOAT32_ONLY, LAYERS, SIX_LAYERS
from tiny_models import packed_tokens, streamed, tiny_model

from layer_surgery.data.objective import NO_LABEL
from layer_surgery.healing.body import Body
from layer_surgery.healing.packing import Packing, packed_batch_size, packs

#: Learned positions that do not take position ids, biases by distance, masks of their own, and recurrent layers.
NOT_EXACT = {"bloom", "falcon", "gpt_oss", "granitemoehybrid", "lfm2", "mpt", "opt", "qwen3_5_text", "qwen3_next"}


@pytest.mark.parametrize("sizes", [[5, 1, 2, 4, 3, 5], [3], [2, 2], [1, 1, 1, 6]])
def test_every_token_has_a_place_of_its_own_and_comes_back(sizes: list[int]) -> None:
    packing = Packing.of(sizes)
    length = max(sizes)
    ids = torch.zeros(len(sizes), length, dtype=torch.int64)
    for window, size in enumerate(sizes):
        ids[window, :size] = 100 * (window + 1) + torch.arange(size)
    packed = packing.packed({"input_ids": ids})
    assert packed["input_ids"].shape == packed["position_ids"].shape == (packing.count, length)
    assert sorted(packed["input_ids"][packed["input_ids"] > 0].tolist()) == sorted(ids[ids > 0].tolist())
    back = packing.apart(packed["input_ids"])
    for window, size in enumerate(sizes):
        assert torch.equal(back[window, :size], ids[window, :size])
    assert torch.equal(packing.apart(packed["position_ids"])[:, :1], torch.zeros(len(sizes), 1, dtype=torch.int64))
    assert packing.count >= sum(sizes) / length and packing.saves == (packing.count < len(sizes))


def test_windows_are_computed_together_as_far_as_their_rows_fit() -> None:
    lengths = torch.tensor([2, 2, 4, 4, 8, 8, 1, 2])
    assert packed_batch_size(lengths, 4, 24) == 4  # three rows of 4, and three of 8
    assert packed_batch_size(lengths, 4, 23) == 2  # two rows of 8
    assert packed_batch_size(lengths, 4, 15) == 1
    assert packed_batch_size(lengths[:6], 3, 99) == 3


@pytest.mark.parametrize("model_type", DECODERS)
def test_an_architecture_is_exact_or_is_known_not_to_be(model_type: str) -> None:
    layers = 6 if model_type in SIX_LAYERS else LAYERS.get(model_type, 2)
    inside = model_type in FLOAT32_ONLY or model_type in FLOAT32_INSIDE
    dtype = torch.float32 if inside else torch.float64
    # As in all models of this type; the tiny one has fewer, and fails wherever there is a mask.
    fields = {"num_key_value_heads": 4} if model_type == "deepseek_v3" else {}
    body = Body(streamed(tiny_model(model_type, layers=layers, dtype=dtype, **fields), dtype=dtype, resident_bytes=0))
    assert packs(body, short_windows()) is (model_type not in NOT_EXACT)


def test_where_there_is_nothing_to_pack_nothing_is_said() -> None:
    body = Body(streamed(tiny_model(layers=1), resident_bytes=0))
    assert packs(body, packed_tokens()) is None


def test_states_are_those_of_windows_apart() -> None:
    tokens, body = short_windows(), Body(streamed(tiny_model(), resident_bytes=0))
    batch = batch_of(tokens, *range(7))
    packing = Packing.of(batch["lengths"])
    assert packing.count == 5
    given = {"input_ids": batch["input_ids"]}
    packed, apart = packing.apart(body.states(packing.packed(given))[body.last]), body.states(given)[body.last]
    carries = batch["labels"] != NO_LABEL
    assert float((packed - apart)[carries].abs().max()) < 1e-12
