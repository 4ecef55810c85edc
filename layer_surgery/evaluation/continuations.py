"""Continuations of prompts, for people to read."""

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from layer_surgery.checkpoint.architectures import longest_sequence
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.progress import Progress


def prompts_from(tokens: PackedTokens, count: int, length: int) -> list[list[int]]:
    """Return the first `length` token ids of `count` windows (or as many as there are), evenly spread over the text."""
    full = [row for row in range(tokens.sequences) if int(tokens.valid[row].sum()) > length]
    rows = full or list(range(tokens.sequences))
    count = min(count, len(rows))
    chosen = [rows[k * len(rows) // count] for k in range(count)]
    return [tokens.token_ids[row][tokens.valid[row]][:length].tolist() for row in chosen]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return token ids with what the tokenizer puts before a text, and without an EOS behind it."""
    ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    new_tokens: int,
    progress: Progress,
) -> list[str]:
    """Return the greedy continuation of every prompt (token ids), without the prompt; it ends at an EOS token."""
    longest, pad = longest_sequence(model.config), tokenizer.pad_token_id
    written = []
    with progress("continuations", len(prompts)) as advance:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            room = new_tokens if longest is None else max(1, min(new_tokens, longest - len(prompt)))
            config = GenerationConfig(
                do_sample=False,
                max_new_tokens=room,
                pad_token_id=0 if pad is None else pad,
                eos_token_id=model.config.eos_token_id or tokenizer.eos_token_id,
            )
            output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            written.append(str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)))
            advance()
    return written
