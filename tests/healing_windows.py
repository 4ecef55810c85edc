"""Windows of different lengths, and batches of them."""

from __future__ import annotations

import torch
from tiny_models import packed_tokens
from torch import Tensor

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.windows import WindowDataset


def short_windows(n: int = 7, s: int = 12) -> PackedTokens:
    """Return windows of 12, 11, 10, 9, 8, 7, 11 tokens and so on, and one of 4 and 3."""
    tokens = packed_tokens(n, s, padding=True, excluded=0.3)
    tokens.valid[2, 4:] = tokens.valid[4, 3:] = False
    return PackedTokens(
        name=tokens.name,
        token_ids=torch.where(tokens.valid, tokens.token_ids, 0),
        loss_mask=tokens.loss_mask & tokens.valid,
        valid=tokens.valid,
        tokens_available=tokens.tokens_available,
        sha256=tokens.sha256,
    )


def batch_of(tokens: PackedTokens, *windows: int) -> dict[str, Tensor]:
    return WindowDataset(tokens, torch.arange(tokens.sequences)).collate(windows)
