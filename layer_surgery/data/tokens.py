"""Packed token sequences: the one form in which text reaches a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """The part of the calibration data that comes from one source."""

    name: str  #: As the user gave it.
    weight: float  #: The number of sequences is proportional to it.
    sequences: int
    tokens_available: int  #: Number of tokens that the source has.
    tokens: int  #: Number of them in its sequences.
    predicted_tokens: int  #: Number of these that carry loss.
    sha256: str  #: Hash of its sequences by themselves, as in `PackedTokens`.


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Sequences of one length, with masks.

    Shapes: N sequences, S tokens each. All tensors live on the CPU.
    """

    name: str  #: As the user gave it: a name or a file; for a mixture all of them with their weights.
    token_ids: Tensor  #: [N, S] int64.
    loss_mask: Tensor
    """[N, S] bool. True where the token at this position is a label that counts; position 0 never is,
    because nothing predicts it. The prediction of position t is read off position t - 1."""
    valid: Tensor
    """[N, S] bool. False for right padding, which no statistic may see. Causal attention keeps padding on the
    right from touching anything to its left, so no attention mask is needed."""
    tokens_available: int  #: Number of tokens that the sources have; those used are `valid.sum()`.
    sha256: str  #: Hash of token ids and masks: the identity of the data for provenance and caches.
    sources: tuple[SourceShare, ...] = ()  #: The share of each source, in the user's order; for calibration data only.

    @property
    def sequences(self) -> int:
        return self.token_ids.shape[0]

    @property
    def sequence_length(self) -> int:
        return self.token_ids.shape[1]

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.loss_mask.sum())

    def select(self, rows: Tensor | slice) -> PackedTokens:
        """Return some of the sequences, by number, under the same name; shares of sources are not known of them."""
        return self.holding(self.token_ids[rows], self.loss_mask[rows], self.valid[rows])

    def holding(self, token_ids: Tensor, loss_mask: Tensor, valid: Tensor) -> PackedTokens:
        """Return other sequences [N, S] under the same name; shares of sources are not known of them."""
        token_ids, loss_mask, valid = token_ids.contiguous(), loss_mask.contiguous(), valid.contiguous()
        return PackedTokens(
            name=self.name,
            token_ids=token_ids,
            loss_mask=loss_mask,
            valid=valid,
            tokens_available=self.tokens_available,
            sha256=tokens_hash(token_ids, loss_mask, valid),
        )

    def batches(self, batch_size: int) -> Iterator[slice]:
        """Yield slices over the sequences, each of at most `batch_size`."""
        for start in range(0, self.sequences, batch_size):
            yield slice(start, min(start + batch_size, self.sequences))


def joined(name: str, parts: Sequence[PackedTokens]) -> PackedTokens:
    """Return the sequences of all parts, which are of one length, behind one another."""
    fields = ("token_ids", "loss_mask", "valid")
    token_ids, loss_mask, valid = (torch.cat([getattr(part, field) for part in parts]) for field in fields)
    return PackedTokens(
        name=name,
        token_ids=token_ids,
        loss_mask=loss_mask,
        valid=valid,
        tokens_available=sum(part.tokens_available for part in parts),
        sha256=tokens_hash(token_ids, loss_mask, valid),
    )


def tokens_hash(token_ids: Tensor, loss_mask: Tensor, valid: Tensor) -> str:
    """Return the SHA-256 (hexadecimal) of sequences and masks, each [N, S]."""
    digest = hashlib.sha256(f"{token_ids.shape[0]}x{token_ids.shape[1]}".encode())
    for array in (token_ids.numpy().astype("<i8"), loss_mask.numpy(), valid.numpy()):
        digest.update(array.tobytes())
    return digest.hexdigest()
