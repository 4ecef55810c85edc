"""The losses of heads: what each token, or each sequence, costs."""

import torch
from einops import rearrange
from torch import Tensor, nn

from layer_surgery.data.objective import NO_LABEL, Objective
from layer_surgery.data.tokens import PackedTokens


def targets(tokens: PackedTokens, rows: slice | Tensor) -> Tensor:
    """Return what is predicted of some sequences: `PackedTokens.labels`, or the next tokens."""
    return next_tokens(tokens, rows) if tokens.labels is None else tokens.labels[rows]


def next_tokens(tokens: PackedTokens, rows: slice | Tensor) -> Tensor:
    """Return the labels [B, S] int64 of some sequences: the next token where it carries loss, else `NO_LABEL`.

    The label of position t is token t + 1: shifted here, once, and nowhere else.
    """
    ids, mask = tokens.token_ids[rows], tokens.loss_mask[rows]
    labels = torch.full(ids.shape, NO_LABEL)
    labels[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], NO_LABEL)
    return labels


def losses(logits: Tensor, labels: Tensor, objective: Objective) -> Tensor:
    """Return the losses of tokens [B, S], or of sequences [B], in float32 or better: zero where there is no label.

    They are those that transformers' models compute for themselves, but for the mean over the batch: cross-entropy;
    for several labels the binary one, and for numbers the squared error, both as a mean over the head's outputs.

    Args:
        logits: [B, S, V], or [B, L] for one answer a sequence.
        labels: as `targets` gives them.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if objective.problem == "regression":
        return (logits - labels.to(logits.dtype)).pow(2).mean(dim=1)
    if objective.problem == "multi_label":
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        return each.mean(dim=1)
    if objective.of_sequences:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    flat = rearrange(logits, "batch sequence vocabulary -> (batch sequence) vocabulary")
    each = nn.functional.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=NO_LABEL)
    return each.view(labels.shape)
