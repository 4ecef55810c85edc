"""Packed token sequences: the one form in which text reaches a model."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from layer_surgery.data.objective import NEXT_TOKEN, Objective


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
    right from touching anything to its left, so no attention mask is needed to predict the next token; other models
    are given one."""
    tokens_available: int  #: Number of tokens that the sources have; those used are `valid.sum()`.
    sha256: str  #: Hash of token ids and masks: the identity of the data for provenance and caches.
    sources: tuple[SourceShare, ...] = ()  #: The share of each source, in the user's order; for calibration data only.
    objective: Objective = NEXT_TOKEN  #: What is predicted.
    labels: Tensor | None = None
    """What is predicted, where that is not the next token: [N, S] int64, `NO_LABEL` where there is none (masked tokens,
    tags); one a sequence, [N] int64 (a label) or [N, L] float32 (several labels as 0 and 1, or numbers). The loss mask
    of the latter is True at the first token of each sequence, and there only."""
    segments: Tensor | None = None  #: [N, S] int64, which of two texts a token is of, where the model wants to know.

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

    def inputs(self, rows: slice, chosen: Tensor | None = None) -> dict[str, Tensor]:
        """Return what a model is called with for some sequences, or for those of them that `chosen` [B] bool names."""
        given = {"input_ids": self.token_ids}
        if self.objective.problem != "next_token":
            given["attention_mask"] = self.valid.long()
        if self.segments is not None:
            given["token_type_ids"] = self.segments
        return {name: tensor[rows] if chosen is None else tensor[rows][chosen] for name, tensor in given.items()}

    def batches(self, batch_size: int) -> Iterator[slice]:
        """Yield slices over the sequences, each of at most `batch_size`."""
        for start in range(0, self.sequences, batch_size):
            yield slice(start, min(start + batch_size, self.sequences))
