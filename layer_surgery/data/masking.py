"""Text for masked language models: windows with the tokens that the tokenizer puts around a text, some of them masked.

As BERT was trained (https://arxiv.org/abs/1810.04805, section 3.1): of every window some tokens are to be told; most of
them are masked, some replaced by a random one, some left. Shapes: N windows, S tokens each.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layer_surgery.data.documents import LoadedData
from layer_surgery.data.encoding import encode_texts
from layer_surgery.data.objective import NO_LABEL, Objective
from layer_surgery.data.tokens import PackedTokens, packed_tokens
from layer_surgery.errors import CheckpointError, DataError

#: Share of the tokens to tell, and of these, of those that are masked and those that are replaced by a random one.
CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and behind a text by itself."""
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise CheckpointError("the tokenizer changes a text when it puts special tokens around it, so texts cannot be cut.")


def text_windows(
    data: LoadedData, tokenizer: PreTrainedTokenizerBase, *, sequence_length: int
) -> tuple[Tensor, Tensor, int]:
    """Return all windows of a text [N, S] int64, which of their tokens are text [N, S] bool, and how many there are.

    Windows do not overlap; the last is padded on the right with token 0.
    """
    if data.kind != "text":
        raise DataError(
            f"{data.name} has {data.kind}s, but a masked language model is calibrated on texts; name the column with "
            "--text-column."
        )
    before, behind = special_tokens(tokenizer)
    stream = encode_texts(tokenizer, data)
    body = sequence_length - len(before) - len(behind)
    if body < 1:
        raise DataError(
            f"--sequence-length is {sequence_length}, but the tokenizer puts {len(before) + len(behind)} tokens around "
            "each text; give more."
        )
    pieces = [stream[start : start + body] for start in range(0, len(stream), body)]
    ids = torch.zeros(len(pieces), sequence_length, dtype=torch.int64)
    text = torch.zeros_like(ids, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        whole = torch.tensor([*before, *piece.tolist(), *behind])
        ids[row, : len(whole)] = whole
        text[row, len(before) : len(before) + len(piece)] = True
    return ids, text, len(stream)


def pack_masked(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    windows: tuple[Tensor, Tensor, int],
    generator: torch.Generator,
) -> PackedTokens:
    """Mask tokens of these windows (some of those of `text_windows`), which of them by the generator."""
    ids, text, available = windows
    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        raise CheckpointError("the tokenizer has no mask token, so it is not that of a masked language model.")
    before, behind = special_tokens(tokenizer)
    valid = torch.zeros_like(text)
    for row, count in enumerate(text.sum(dim=1).tolist()):
        valid[row, : len(before) + count + len(behind)] = True
    chosen = text & (torch.rand(ids.shape, generator=generator) < CHOSEN)
    if not chosen.any():
        raise DataError(f"{data.name} is so short that no token of it was chosen to be masked; pass a longer text.")
    lot = torch.rand(ids.shape, generator=generator)
    others = torch.randint(len(tokenizer), ids.shape, generator=generator)
    shown = torch.where(chosen & (lot < MASKED), mask_id, ids)
    shown = torch.where(chosen & (lot >= 1 - RANDOM), others, shown)
    padding = next(int(i) for i in (objective.padding_id, tokenizer.pad_token_id, 0) if i is not None)
    packed = packed_tokens(
        data.name,
        torch.where(valid, shown, padding),
        chosen,
        valid,
        available,
        labels=torch.where(chosen, ids, NO_LABEL),
    )
    return replace(packed, objective=objective)
