"""Answers in the original's own words."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from tiny_models import tiny_model
from torch import Tensor

from layer_surgery.data.packing import packed_tokens
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.rewrite import greedy, load_rewritten, prompts, rewritten, save_rewritten

STOP, TAIL = 9, 7


def windows() -> PackedTokens:
    """An example, a text, two answers in one window, one with something behind its end, and one without an end."""
    ids = torch.tensor(
        [
            [1, 2, 3, 4, STOP, 0, 0, 0],
            [1, 2, 3, 4, 5, 6, STOP, 8],
            [1, 2, STOP, 4, 5, STOP, 0, 0],
            [1, 2, 3, STOP, TAIL, 0, 0, 0],
            [1, 2, 3, 4, 5, 0, 0, 0],
        ]
    )
    valid = torch.tensor([[True] * n + [False] * (8 - n) for n in (5, 8, 6, 5, 5)])
    loss = valid.clone()
    for row, first in enumerate((3, 1, 2, 2, 3)):
        loss[row, :first] = False
    loss[2, 3] = False
    return packed_tokens("task", ids, loss, valid, 30)


def test_answers_are_replaced_where_there_is_one_prompt_and_the_original_ends_it(tmp_path: Path) -> None:
    asked: list[tuple[list[int], int]] = []

    def generate(prompt: Tensor, room: int) -> Tensor:
        asked.append((prompt.tolist(), room))
        return torch.tensor([5, 6, 5, STOP] if len(prompt) == 3 else [6, STOP])

    tokens = windows()
    assert prompts(tokens, {STOP}) == [0, 3]
    new, count = rewritten(tokens, generate, {STOP})
    assert count == 2 and asked == [([1, 2, 3], 5), ([1, 2], 5)]
    assert new.token_ids[0].tolist()[:7] == [1, 2, 3, 5, 6, 5, STOP]
    assert new.valid[0].tolist() == [True] * 7 + [False] and new.loss_mask[0].tolist() == [False] * 3 + [True] * 4 + [
        False
    ]
    assert new.token_ids[3].tolist()[:5] == [1, 2, 6, STOP, TAIL] and int(new.loss_mask[3].sum()) == 3
    for row in (1, 2, 4):
        assert torch.equal(new.token_ids[row], tokens.token_ids[row])
    assert new.sha256 != tokens.sha256
    save_rewritten(new, count, tmp_path / "cache" / "answers.safetensors")
    known = load_rewritten(tokens, tmp_path / "cache" / "answers.safetensors")
    assert known is not None and known[1] == 2 and known[0].sha256 == new.sha256
    assert load_rewritten(tokens, tmp_path / "none") is None


def test_answers_that_were_changed_on_disk_are_not_used(tmp_path: Path) -> None:
    tokens, file = windows(), tmp_path / "answers.safetensors"
    new, count = rewritten(tokens, lambda _prompt, _room: torch.tensor([6, STOP]), {STOP})
    save_rewritten(new, count, file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in range(start, len(whole), 7):
        changed = bytearray(whole)
        changed[at] ^= 1
        file.write_bytes(changed)
        assert load_rewritten(tokens, file) is None, at
    file.write_bytes(whole)
    assert load_rewritten(tokens, file) is not None
    file.unlink()
    os.mkfifo(file)
    assert load_rewritten(tokens, file) is None


def test_an_answer_that_does_not_end_stays() -> None:
    tokens = windows()
    new, count = rewritten(tokens, lambda _prompt, room: torch.full((room,), 5), {STOP})
    assert count == 0 and new.sha256 == tokens.sha256


def test_greedy_writes_the_most_likely_token_until_a_stop() -> None:
    model = tiny_model(layers=2)
    prompt = torch.tensor([3, 4, 5])
    expected = prompt
    for _ in range(4):
        expected = torch.cat([expected, model(expected[None]).logits[0, -1].argmax()[None]])
    assert torch.equal(greedy(model, {60})(prompt, 4), expected[3:])
    stop = int(expected[4])
    assert greedy(model, {stop})(prompt, 4)[-1] == stop
