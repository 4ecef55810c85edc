"""The loss `relations`: where queries, keys and values are, and a student that is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import labelled_tokens, tiny_encoder
from tiny_families import SIX_LAYERS
from tiny_models import CPU, packed_tokens, settings, streamed, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from layer_surgery.checkpoint.attention import queries_keys_values
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError, UserError
from layer_surgery.healing.capture import asked
from layer_surgery.healing.losses.attention import relation_kl
from layer_surgery.healing.losses.inputs import RelationPair
from layer_surgery.healing.mixture import parse_losses
from layer_surgery.healing.relations import Relations, TeacherAttentionStore, check_relations, last_attention
from layer_surgery.healing.student import Student
from layer_surgery.healing.windows import WindowDataset
from layer_surgery.walk.boundaries import BoundaryStore

FALCONS: dict[str, dict[str, Any]] = {
    "one key for all": {"multi_query": True, "new_decoder_architecture": False},
    "a key for each": {"multi_query": False, "new_decoder_architecture": False},
    "groups": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


def model_of(model_type: str, **fields: Any) -> PreTrainedModel:
    if model_type == "modernbert":
        return tiny_encoder(model_type, "masked_token", layers=2)
    return tiny_model(model_type, layers=2, **fields)


def seen_of(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values [B, S, width] of the last layer, as the loss sees them."""
    checkpoint = open_checkpoint(model)
    place = last_attention(checkpoint)
    with torch.no_grad(), place.seen(model.get_submodule(checkpoint.architecture.layers)[-1]) as seen:  # type: ignore[index]
        model(ids)
    return place.split(place.joined(seen, ids.shape))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [*((name, {}) for name in ("llama", "phi3", "gpt2", "gpt_neox", "modernbert"))]
    + [("falcon", fields) for fields in FALCONS.values()],
)
def test_they_are_those_that_the_model_attends_with(
    model_type: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(model_type, **fields), packed_tokens(2, 7).token_ids
    calls: list[tuple[Tensor, ...]] = []
    attend = nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append((query, key, value))
        return attend(query, key, value, *args, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    model.set_attn_implementation("sdpa")
    found = seen_of(model, ids)
    for name, ours, theirs in zip("qkv", found, calls[-1], strict=True):
        heads = theirs.shape[1] * theirs.shape[3] // ours.shape[-1]  # that share a key, where these are repeated
        theirs = theirs[:, ::heads].transpose(1, 2).flatten(2)
        places = slice(None) if name == "v" else slice(0, 1)  # rotary positions leave the first token alone
        # Some turn queries and keys in float32.
        torch.testing.assert_close(ours[:, places], theirs[:, places], rtol=0, atol=1e-6, msg=name)


def test_those_of_bloom_and_mpt_are_what_the_model_makes_of_its_one_linear() -> None:
    ids = packed_tokens(2, 7).token_ids
    for model_type, taken in (("bloom", "query_key_value"), ("mpt", "Wqkv")):
        model = tiny_model(model_type, layers=2)
        linear = next(each for name, each in reversed([*model.named_modules()]) if name.endswith(taken))
        outputs: list[Tensor] = []
        linear.register_forward_hook(lambda _module, _inputs, output, outputs=outputs: outputs.append(output))
        found = seen_of(model, ids)
        if model_type == "bloom":
            attention = model.transformer.h[-1].self_attention
            parts = [each.transpose(1, 2).flatten(2) for each in attention._reshape(outputs[0])]
        else:
            parts = list(outputs[0].chunk(3, dim=2))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, parts, strict=True))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_where_they_cannot_be_told_apart_the_loss_is_refused(model_type: str) -> None:
    # The one makes keys and values from a narrower state, the other has gates beside its queries.
    model = tiny_model(model_type, layers=8 if model_type in SIX_LAYERS else 4, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=rf"cannot be told apart in layer \d .*\({model_type}\); take losses"):
        check_relations(parse_losses(["relations"]), open_checkpoint(model))


def test_a_layer_without_attention_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"layer 0 .*\(lfm2\)"):
        queries_keys_values(open_checkpoint(tiny_model("lfm2", layers=6)), 0)


def test_relation_heads_must_divide_the_widths_of_both() -> None:
    checkpoint = open_checkpoint(tiny_model(num_key_value_heads=1))  # 48 queries wide, 12 keys
    with pytest.raises(UserError, match=r"heads=8, which does not divide 12, .*; take a divisor of 12, 48\."):
        check_relations(parse_losses(["relations:1:heads=8"]), checkpoint)


def student_of(
    teacher: PreTrainedModel,
    model: PreTrainedModel,
    tokens: PackedTokens,
    scratch: Path,
    memory: int = 0,
    loss: str = "relations",
) -> Student:
    """Return a student whose teacher has been asked; by default what it says is on disk."""
    walked = streamed(teacher)
    place = last_attention(walked.checkpoint)
    shape = (tokens.sequences, tokens.sequence_length, sum(place.widths))
    store = TeacherAttentionStore(
        BoundaryStore(shape, torch.float64, CPU, memory, scratch), place, walked.layer_count - 1
    )
    for _ in asked(walked, tokens, settings(scratch), slice(0, tokens.sequences), None, [store]):
        pass
    student = Student(streamed(model, resident_bytes=0), parse_losses([loss]))
    student.relations = Relations(student.checkpoint, store)
    student.unfreeze({name for name, _ in student.model.named_parameters()})
    return student


def batch_of(tokens: PackedTokens, *windows: int) -> dict[str, Tensor]:
    return WindowDataset(tokens, torch.arange(tokens.sequences)).collate(windows)


def gradient(student: Student) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}


KINDS = {
    "causal": (lambda seed: tiny_model(layers=3, seed=seed), lambda: packed_tokens(6, 9, padding=True, excluded=0.4)),
    "encoder": (
        lambda seed: tiny_encoder("bert", "tags", layers=3, seed=seed),
        lambda: labelled_tokens("tags", n=6, s=9),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind: str, tmp_path: Path) -> None:
    make, data = KINDS[kind]
    tokens = data()
    student = student_of(make(0), make(0), tokens, tmp_path)
    loss = student(**batch_of(tokens, 4, 1, 3))["loss"]
    loss.backward()
    assert abs(float(loss.detach())) < 1e-10
    assert max(float(each.abs().max()) for each in gradient(student).values()) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_both_models_whole(kind: str, tmp_path: Path) -> None:
    make, data = KINDS[kind]
    tokens, teacher = data(), make(0)
    student = student_of(teacher, make(1), tokens, tmp_path, loss="relations:0.5:heads=2")
    windows = (5, 0, 2)
    batch = batch_of(tokens, *windows)
    found = student(**batch)["loss"]
    expected, items = 0.0, 0
    for row, window in enumerate(windows):
        length = int(tokens.valid[window].sum())
        ids = tokens.token_ids[window : window + 1, :length]
        both = [seen_of(model, ids) for model in (student.model, teacher)]
        carries = batch["labels"][row, :length] != NO_LABEL
        visible = carries[:, None] & torch.ones(length, length, dtype=torch.bool).tril()
        if kind == "encoder":
            visible = torch.ones(length, length, dtype=torch.bool)
        pairs = [RelationPair(one, other, visible[None]) for one, other in zip(*both, strict=True)]
        expected += 0.5 * float(relation_kl(pairs, heads=2)) * int(carries.sum())
        items += int(carries.sum())
    assert float(found.detach()) == pytest.approx(expected / items, rel=1e-9)
    assert float(found.detach()) > 1e-3


def test_steps_lower_it_with_fewer_heads_too(tmp_path: Path) -> None:
    tokens = packed_tokens(6, 9)
    student = student_of(tiny_model(layers=3), tiny_model(layers=2, num_attention_heads=2, seed=1), tokens, tmp_path)
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = student(**batch_of(tokens, *range(6)))["loss"]
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


def test_neither_micro_batches_nor_activations_computed_twice_change_the_gradient(tmp_path: Path) -> None:
    tokens = packed_tokens(6, 9, padding=True, excluded=0.4)
    items = int((batch_of(tokens, *range(6))["labels"] != NO_LABEL).sum())

    def of(*parts: range, twice: bool = False) -> dict[str, Tensor]:
        student = student_of(tiny_model(), tiny_model(seed=1), tokens, tmp_path, memory=1 << 20)
        if twice:
            student.activation_checkpointing_enable()
            student.train()
        for part in parts:
            student(**batch_of(tokens, *part), num_items_in_batch=items)["loss"].backward()
        return gradient(student)

    whole = of(range(6))
    assert len(whole) > 30
    for other in (of(range(1), range(1, 4), range(4, 6)), of(range(6), twice=True)):
        assert whole.keys() == other.keys()
        assert max(float((whole[name] - other[name]).abs().max()) for name in whole) < 1e-12
