"""The original beside the student: the losses that need both in memory, and those that do not, of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from healing_windows import batch_of, short_windows
from tiny_encoders import labelled_tokens, tiny_encoder
from tiny_families import DECODERS, LAYERS, SIX_LAYERS
from tiny_models import packed_tokens, streamed, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError
from layer_surgery.healing.attention_maps import AttentionMaps, attended, attention_name, compared_layers
from layer_surgery.healing.mixture import parse_losses
from layer_surgery.healing.relations import Relations, last_attention
from layer_surgery.healing.resident import ResidentOutputs, ResidentProjections, ResidentStates, ResidentTeacher
from layer_surgery.healing.stones import SteppingStones
from layer_surgery.healing.student import Student

LAYERS_OF_BOTH = 4
#: Attention of their own, or queries that cannot be told apart.
NO_MAPS = {
    *("bloom", "deepseek_v3", "falcon", "gemma2", "gpt_neo", "gpt_oss", "gptj", "mpt"),
    *("qwen3_5_text", "qwen3_next", "stablelm"),
}
EVERY_LOSS = ("kl:0.3", "jsd", "dkd:0.1", "hidden", "cosine:1:projected=1", "relations", "stones:0.5", "attention:0.2")


def student_of(
    teacher: PreTrainedModel, model: PreTrainedModel, *losses: str, surviving: tuple[int, ...] | None = None
) -> Student:
    """Return a student of which every layer was changed, with the original beside it."""
    surviving = surviving or tuple(range(LAYERS_OF_BOTH))
    following = [*surviving[1:], LAYERS_OF_BOTH]
    pairs = [(position, after - 1) for position, after in enumerate(following)]
    parsed = parse_losses(losses)
    needs = {loss.entry.needs: loss for loss in parsed}
    original = open_checkpoint(teacher)
    student = Student(streamed(model, resident_bytes=0), parsed, pairs=pairs)
    student.maps = AttentionMaps(student.checkpoint, original, surviving) if "attention" in needs else None
    resident = ResidentTeacher(
        streamed(original, resident_bytes=0),
        [layer for _, layer in pairs] if "states" in needs else [],
        last_attention(original) if "relations" in needs else None,
        student.maps,
    )
    student.resident = resident
    if {"logits", "stones"} & needs.keys():
        student.outputs = ResidentOutputs(resident)
    if "states" in needs:
        student.states = ResidentStates(resident)
    if "relations" in needs:
        student.relations = Relations(student.checkpoint, ResidentProjections(resident))
    if "stones" in needs:
        blocks = int(needs["stones"].settings["blocks"])
        student.stones = SteppingStones(resident, range(len(surviving)), pairs, blocks)
    student.unfreeze({name for name, _ in student.model.named_parameters()})
    return student


def loss_of(student: Student, tokens: PackedTokens, *windows: int) -> Tensor:
    return student(**batch_of(tokens, *windows))["loss"]


def gradient(student: Student) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", ["stones", "stones:1:blocks=2", "attention", "kl", "hidden:1:projected=1"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(loss: str, packed: bool) -> None:
    student = student_of(tiny_model(), tiny_model(), loss)
    student.packs = packed
    found = loss_of(student, short_windows(), *range(7))
    found.backward()
    assert abs(float(found.detach())) < 1e-12
    assert max(float(each.abs().max()) for each in gradient(student).values()) < 1e-12


@pytest.mark.parametrize("loss", ["stones:1:temperature=2", "attention"])
def test_gradients_are_those_of_the_value(loss: str) -> None:
    # Norms of this one do not round to float32 inside.
    tokens, student = short_windows(), student_of(tiny_model("gpt2"), tiny_model("gpt2", seed=1), loss)
    loss_of(student, tokens, 1, 2, 4).backward()
    found, step = gradient(student), 1e-5
    generator = torch.Generator().manual_seed(0)
    parameters = dict(student.named_parameters())
    names = ["model.transformer.h.0.attn.c_attn.weight", "model.transformer.h.2.mlp.c_proj.weight"]
    if loss.startswith("stones"):
        names += ["model.lm_head.weight", "model.transformer.h.3.attn.c_attn.weight"]
    for name in names:
        direction = torch.randn(parameters[name].shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[name] += sign * step * direction
                values.append(float(loss_of(student, tokens, 1, 2, 4)))
                parameters[name] -= sign * step * direction
        expected = (values[0] - values[1]) / (2 * step)
        assert float((found[name] * direction).sum()) == pytest.approx(expected, rel=1e-6)
        assert abs(expected) > 1e-6


@torch.no_grad()
def run_layers(model: Any, hidden: Tensor, first: int, stop: int) -> Tensor:
    """Return the states after some layers of a llama, called one by one."""
    positions = torch.arange(hidden.shape[1])[None]
    turned = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers[first:stop]:
        hidden = layer(hidden, position_embeddings=turned, attention_mask=None)
    return hidden


def test_stones_are_the_students_first_layers_and_the_rest_of_the_original() -> None:
    tokens, teacher, model = short_windows(), tiny_model(), tiny_model(seed=1, layers=3)
    # The original's layer 2 was removed: behind the student's layer 1 comes layer 3.
    student = student_of(teacher, model, "stones:1:blocks=3", surviving=(0, 1, 3))
    assert student.stones is not None and student.stones.positions == [0, 1]
    found = float(loss_of(student, tokens, 0, 3).detach())
    total, count = 0.0, 0
    model.requires_grad_(False)
    for window in (0, 3):
        size = int(tokens.valid[window].sum())
        ids = tokens.token_ids[window, :size][None]
        states = model.model.embed_tokens(ids)
        stones = [
            teacher.lm_head(teacher.model.norm(run_layers(teacher, run_layers(model, states, 0, taken), after, 4)))
            for taken, after in ((1, 1), (2, 3))
        ]
        carries = tokens.loss_mask[window, 1:size]
        p = teacher(ids).logits[0, :-1][carries].log_softmax(-1)
        for weight, logits in zip((0.25, 0.5, 1), [*stones, model(ids).logits], strict=True):
            q = logits[0, :-1][carries].log_softmax(-1)
            total += weight * float((p.exp() * (p - q)).sum().detach())
        count += int(carries.sum())
    assert found == pytest.approx(total / count, rel=1e-9)


def test_blocks_share_out_the_changed_layers() -> None:
    resident: Any = None
    pairs = [(position, position) for position in range(12)]
    assert SteppingStones(resident, range(12), pairs, 4).positions == [2, 5, 8]
    assert SteppingStones(resident, [3, 7, 9], pairs, 4).positions == [3, 7, 9]
    assert SteppingStones(resident, [3, 7, 11], pairs, 4).positions == [3, 7]
    assert SteppingStones(resident, [11], pairs, 4).positions == []


def scores_of(model: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the scores [1, H, S, S] of each layer, from what torch's attention is called with."""
    found: list[Tensor] = []
    attend = nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        found.append(query @ key.transpose(-1, -2) * (options.get("scale") or query.shape[-1] ** -0.5))
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return attend(
            query, key, value, *args, **{name: value for name, value in options.items() if name != "enable_gqa"}
        )

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(nn.functional, "scaled_dot_product_attention", spy)
        model(ids, use_cache=False)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_the_squared_error_of_scores_of_the_same_layer(
    packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, teacher, model = short_windows(), tiny_model("qwen3"), tiny_model("qwen3", seed=1, layers=3)
    student = student_of(teacher, model, "attention", surviving=(0, 1, 3))
    student.packs = packed
    found = float(loss_of(student, tokens, *range(7)).detach())
    total, count = 0.0, 0
    for window in range(7):
        size = int(tokens.valid[window].sum())
        ids = tokens.token_ids[window, :size][None]
        theirs, ours = scores_of(teacher, ids, monkeypatch), scores_of(model, ids, monkeypatch)
        carries = torch.cat([tokens.loss_mask[window, 1:size], torch.zeros(1, dtype=torch.bool)])
        visible = carries[:, None] & torch.ones(size, size, dtype=torch.bool).tril()
        if carries.any():
            near = visible & torch.ones(size, size, dtype=torch.bool).triu(-4)  # the original's layer 3 sees 5 tokens
            errors = [
                (ours[k] - theirs[layer])[:, :, near if layer == 3 else visible].square().mean()
                for k, layer in enumerate((0, 1, 3))
            ]
            total += float(torch.stack(errors).mean()) * int(carries.sum())
        count += int(carries.sum())
    assert found == pytest.approx(total / count, rel=1e-9)


@pytest.mark.parametrize("model_type", [*DECODERS, "bert", "modernbert"])
def test_maps_are_seen_or_the_architecture_is_refused_by_name(model_type: str) -> None:
    layers = 6 if model_type in SIX_LAYERS else LAYERS.get(model_type, 2)
    encoder = model_type in ("bert", "modernbert")
    model = (
        tiny_encoder(model_type, "masked_token", layers=2)
        if encoder
        else tiny_model(model_type, layers=layers, dtype=torch.float32)
    )
    checkpoint = open_checkpoint(model)
    if model_type in NO_MAPS:
        with pytest.raises(CheckpointError, match=rf"\({model_type}\).*; use --loss relations"):
            compared_layers(checkpoint, checkpoint, range(checkpoint.layer_count))
        return
    pairs, left_out = compared_layers(checkpoint, checkpoint, range(checkpoint.layer_count))
    assert pairs and not left_out
    decoder_layers = model.get_submodule(checkpoint.architecture.layers)
    modules = {k: decoder_layers[k].get_submodule(attention_name(checkpoint, k)) for k, _ in pairs}  # type: ignore[index]
    with torch.no_grad(), attended(modules) as seen:
        model(packed_tokens(2, 7).token_ids)
    assert seen.keys() == modules.keys()
    assert all(each.scores(0, slice(0, 7)).shape[2:] == (7, 7) for each in seen.values())
    assert all(each.visible(0, slice(0, 7)).shape == (1, 7, 7) for each in seen.values())


def test_layers_with_other_heads_are_left_out_and_refused_if_there_is_no_other() -> None:
    original, fewer = (open_checkpoint(tiny_model(num_attention_heads=heads)) for heads in (4, 2))
    with pytest.raises(CheckpointError, match=r"all 4 layers of .* other numbers of heads .*; use --loss relations"):
        compared_layers(fewer, original, range(4))


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_rows_that_are_shared_change_neither_a_loss_nor_its_gradient(loss: str) -> None:
    tokens = short_windows()

    def of(packs: bool) -> tuple[float, dict[str, Tensor]]:
        student = student_of(tiny_model(), tiny_model(seed=1), loss)
        student.packs = packs
        found = loss_of(student, tokens, *range(7))
        found.backward()
        return float(found.detach()), gradient(student)

    (apart, expected), (together, found) = of(False), of(True)
    assert together == pytest.approx(apart, abs=1e-10) and apart > 1e-4
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-10


def test_neither_micro_batches_nor_activations_computed_twice_change_the_gradient() -> None:
    tokens = short_windows()
    items = int((batch_of(tokens, *range(7))["labels"] != NO_LABEL).sum())

    def of(*parts: range, twice: bool = False) -> dict[str, Tensor]:
        student = student_of(tiny_model(), tiny_model(seed=1), "stones", "attention", "kl")
        student.packs = True
        if twice:
            student.activation_checkpointing_enable()
            student.train()
        for part in parts:
            student(**batch_of(tokens, *part), num_items_in_batch=items)["loss"].backward()
        return gradient(student)

    whole = of(range(7))
    for other in (of(range(2), range(2, 7)), of(range(7), twice=True)):
        assert max(float((whole[name] - other[name]).abs().max()) for name in whole) < 1e-12


def test_what_it_says_in_memory_is_what_it_says_when_it_is_asked_first() -> None:
    tokens, teacher = short_windows(), tiny_model()
    student = student_of(teacher, tiny_model(seed=1), "kl", "dkd:0.1", "hidden", "relations")
    batch = batch_of(tokens, 2, 0, 5)
    student(**batch)
    means, _ = student.sums.take()
    logits = [model(batch["input_ids"]).logits for model in (teacher, student.model)]
    carries = batch["labels"] != NO_LABEL
    p, q = (each[carries].log_softmax(-1) for each in logits)
    assert means["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean().detach()), rel=1e-9)


@pytest.mark.parametrize(("problem", "model_type"), [("tags", "bert"), ("single_label", "llama")])
def test_classifiers_follow_an_original_in_memory(problem: Any, model_type: str) -> None:
    tokens = labelled_tokens(problem)
    teacher, model = (tiny_encoder(model_type, problem, layers=LAYERS_OF_BOTH, seed=seed) for seed in (0, 1))
    losses = ["kl", "hidden:0.1", "attention:0.1"] + (["stones"] if problem == "tags" else [])
    equal, student = (student_of(teacher, each, *losses) for each in (teacher, model))
    batch = batch_of(tokens, 0, 1, 2)
    assert abs(float(equal(**batch)["loss"].detach())) < 1e-10
    found = student(**batch)["loss"]
    found.backward()
    assert float(found.detach()) > 1e-3 and len(gradient(student)) > 10
