"""Packed token sequences: the one form in which text reaches a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """What one source gives to the calibration data."""

    name: str
    """What the user called the source."""
    weight: float
    """What its number of sequences was made proportional to."""
    sequences: int
    tokens_available: int
    """How many tokens the source has."""
    tokens: int
    """How many of them are in its sequences."""
    predicted_tokens: int
    """How many of these carry loss."""
    sha256: str
    """Hash of its sequences by themselves, as in `PackedTokens`."""


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Sequences of one length, with masks.

    Shapes: N sequences, S tokens each. All tensors live on the CPU.
    """

    name: str
    """What the user called the data (a name or a file; all of them with their weights for a mixture)."""
    token_ids: Tensor
    """[N, S] int64."""
    loss_mask: Tensor
    """[N, S] bool. True where the token at this position is a label that counts; position 0 never is,
    because nothing predicts it. The prediction of position t is read off position t - 1."""
    valid: Tensor
    """[N, S] bool. False for right padding, which no statistic may see. Causal attention keeps padding on the
    right from touching anything to its left, so no attention mask is needed."""
    tokens_available: int
    """How many tokens the sources have; those used are `valid.sum()`."""
    sha256: str
    """Hash of token ids and masks: the identity of the data for provenance and caches."""
    sources: tuple[SourceShare, ...] = ()
    """What each source gives, in the user's order; for calibration data only."""

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

    def batches(self, batch_size: int) -> Iterator[slice]:
        """Yield slices over the sequences, each of at most `batch_size`."""
        for start in range(0, self.sequences, batch_size):
            yield slice(start, min(start + batch_size, self.sequences))
