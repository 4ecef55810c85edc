"""Answers in the original's own words, for prompts of the user's: self-data distillation.

Trained on answers that it would not give, a student drifts from its teacher; trained on what the teacher answers, it
keeps more of what it knew (https://arxiv.org/abs/2410.09982).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.disk.own import remove_dead
from layer_surgery.disk.reading import check_regular
from layer_surgery.disk.writing import staged_file
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.healing.teacher.cache import STAGING

Generate = Callable[[Tensor, int], Tensor]
"""From token ids [n] and a number of tokens to as many new ones [m], or fewer where it ends before."""


def prompts(tokens: PackedTokens, stops: Collection[int]) -> list[int]:
    """Return the windows that hold one prompt with one answer behind it, which a token of `stops` ends."""
    return [row for row in range(tokens.sequences) if _answer(tokens, row, stops) is not None]


def rewritten(
    tokens: PackedTokens, generate: Generate, stops: Collection[int], advance: Callable[[], None] = lambda: None
) -> tuple[PackedTokens, int]:
    """Return windows in which the original answers the prompts, and how many answers are its own.

    An answer that it does not end within the window stays as it was. What stands behind the end of an answer, as a
    template may have it, stands behind the new one too.

    Args:
        tokens: one prompt and answer in each window, as far as they are prompts.
        generate: of the original.
        stops: tokens that end an answer.
        advance: called after each prompt.
    """
    parts = {
        "token_ids": tokens.token_ids.clone(),
        "loss_mask": tokens.loss_mask.clone(),
        "valid": tokens.valid.clone(),
    }
    count = 0
    for row in prompts(tokens, stops):
        begin, end, stop = _answer(tokens, row, stops) or (0, 0, 0)
        tail = tokens.token_ids[row, stop + 1 : end]
        answer = generate(tokens.token_ids[row, :begin], tokens.sequence_length - begin - len(tail))
        advance()
        if len(answer) == 0 or int(answer[-1]) not in stops:
            continue
        answer = torch.cat([answer, tail])
        new_end = begin + len(answer)
        parts["token_ids"][row, begin:new_end] = answer
        for name in ("loss_mask", "valid"):
            parts[name][row, begin:new_end] = True
            parts[name][row, new_end:] = False
        count += 1
    return tokens.holding(**parts), count


def greedy(model: PreTrainedModel, stops: Collection[int]) -> Generate:
    """Return a function that has a model write the most likely token each time, until one of `stops`."""
    config = GenerationConfig(do_sample=False, eos_token_id=sorted(stops), pad_token_id=0)

    @torch.no_grad()
    def generate(prompt: Tensor, room: int) -> Tensor:
        ids = prompt[None].to(model.device)
        found: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, max_new_tokens=room
        )
        return found[0, len(prompt) :].cpu()

    return generate


def save_rewritten(tokens: PackedTokens, count: int, file: Path) -> None:
    """Keep windows that were rewritten. Raises `LayerSurgeryError` if that fails."""
    tensors = {"token_ids": tokens.token_ids, "loss_mask": tokens.loss_mask, "valid": tokens.valid}
    about = {"sha256": _sha256(tokens, count)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(file, STAGING) as staging:
            save_file(tensors | {"count": torch.tensor(count)}, staging, about)
    except (OSError, SafetensorError) as error:
        raise LayerSurgeryError(
            f"--teacher-cache {file.parent} cannot be written ({error}); is the disk full?"
        ) from error


def load_rewritten(tokens: PackedTokens, file: Path) -> tuple[PackedTokens, int] | None:
    """Return what `save_rewritten` has kept in the place of `tokens`; None if nothing usable is there."""
    remove_dead(file.parent, STAGING)
    try:
        check_regular(file)
        with safe_open(file, framework="pt") as stored:
            about = stored.metadata() or {}
            parts = {name: stored.get_tensor(name) for name in ("token_ids", "loss_mask", "valid")}
            count = int(stored.get_tensor("count"))
    except (OSError, SafetensorError, ValueError, RuntimeError):
        return None
    if any(
        part.shape != tokens.token_ids.shape or part.dtype != getattr(tokens, name).dtype
        for name, part in parts.items()
    ):
        return None
    found = tokens.holding(**parts)
    return (found, count) if about.get("sha256") == _sha256(found, count) else None


def _sha256(tokens: PackedTokens, count: int) -> str:
    return hashlib.sha256(f"{tokens.sha256} {count}".encode()).hexdigest()


def _answer(tokens: PackedTokens, row: int, stops: Collection[int]) -> tuple[int, int, int] | None:
    """Return where the answer of a window begins, where the window ends, and where the answer's last stop is.

    None for a text, for several answers, and for an answer without a stop.
    """
    mask, end = tokens.loss_mask[row], int(tokens.valid[row].sum())
    carries = mask.nonzero().flatten()
    if len(carries) == 0 or int(carries[0]) < 2 or int(carries[-1]) != end - 1 or len(carries) != end - int(carries[0]):
        return None
    begin = int(carries[0])
    stop = next((place for place in range(end - 1, begin - 1, -1) if int(tokens.token_ids[row, place]) in stops), None)
    return None if stop is None else (begin, end, stop)
