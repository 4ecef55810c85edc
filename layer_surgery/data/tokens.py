"""Packed token sequences: the one form in which text reaches a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from layer_surgery.data.objective import NEXT_TOKEN, NO_LABEL, Objective


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
    documents: Tensor | None = None
    """[N] int64, which document each sequence is a window of, where a document may have several. In evaluation data its
    windows stand one behind the other, and what is counted by example is counted by document."""
    texts: tuple[str, ...] | None = None
    """[N] what each sequence says, without a prompt, where sequences are the passages of an embedding model: for models
    with other tokens."""

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

    def inputs(self, rows: slice | Tensor, chosen: Tensor | None = None) -> dict[str, Tensor]:
        """Return what a model is called with for some sequences, or for those of them that `chosen` [B] bool names."""
        given = {"input_ids": self.token_ids}
        if self.objective.problem != "next_token":
            given["attention_mask"] = self.valid.long()
        if self.segments is not None:
            given["token_type_ids"] = self.segments
        return {name: tensor[rows] if chosen is None else tensor[rows][chosen] for name, tensor in given.items()}

    def select(self, rows: Tensor | slice) -> PackedTokens:
        """Return some of the sequences, by number, under the same name; shares of sources are not known of them."""
        chosen = packed_tokens(
            self.name,
            self.token_ids[rows],
            self.loss_mask[rows],
            self.valid[rows],
            self.tokens_available,
            labels=None if self.labels is None else self.labels[rows],
            segments=None if self.segments is None else self.segments[rows],
        )
        documents = None if self.documents is None else self.documents[rows]
        return replace(chosen, objective=self.objective, documents=documents, texts=_chosen(self.texts, rows))

    def first_tokens(self, length: int) -> PackedTokens:
        """Return the first tokens of each sequence, where what is behind them is padding."""
        of_tokens = self.labels is not None and not self.objective.of_sequences
        cut = packed_tokens(
            self.name,
            self.token_ids[:, :length],
            self.loss_mask[:, :length],
            self.valid[:, :length],
            self.tokens_available,
            labels=self.labels[:, :length] if of_tokens and self.labels is not None else self.labels,
            segments=None if self.segments is None else self.segments[:, :length],
        )
        return replace(cut, objective=self.objective, documents=self.documents, texts=self.texts)

    def holding(self, token_ids: Tensor, loss_mask: Tensor, valid: Tensor) -> PackedTokens:
        """Return other sequences [N, S], whose labels are their next tokens, under the same name and without shares."""
        return packed_tokens(self.name, token_ids, loss_mask, valid, self.tokens_available)

    def batches(self, batch_size: int) -> Iterator[slice]:
        """Yield slices over the sequences, each of at most `batch_size`."""
        for start in range(0, self.sequences, batch_size):
            yield slice(start, min(start + batch_size, self.sequences))


def packed_tokens(
    name: str,
    token_ids: Tensor,
    loss_mask: Tensor,
    valid: Tensor,
    available: int,
    *,
    labels: Tensor | None = None,
    segments: Tensor | None = None,
) -> PackedTokens:
    """Put sequences and masks, each `[N, S]`, into a record with the hash of what is in them."""
    token_ids, loss_mask, valid = token_ids.contiguous(), loss_mask.contiguous(), valid.contiguous()
    digest = hashlib.sha256(f"{token_ids.shape[0]}x{token_ids.shape[1]}".encode())
    for array in (token_ids.numpy().astype("<i8"), loss_mask.numpy(), valid.numpy()):
        digest.update(array.tobytes())
    for kind, more in (("labels", labels), ("segments", segments)):
        if more is not None:
            digest.update(f"{kind} {list(more.shape)} {more.dtype}".encode() + more.contiguous().numpy().tobytes())
    return PackedTokens(
        name=name,
        token_ids=token_ids,
        loss_mask=loss_mask,
        valid=valid,
        tokens_available=available,
        sha256=digest.hexdigest(),
        labels=labels,
        segments=segments,
    )


def joined(name: str, parts: Sequence[PackedTokens], order: Tensor | slice = slice(None)) -> PackedTokens:
    """Return the sequences of several records in one, padded to the longest, in the given order ([N] int64).

    Documents of different records are different ones.
    """
    length = max(part.sequence_length for part in parts)
    objective = parts[0].objective
    padding = objective.padding_id or 0

    def stacked(tensors: Sequence[Tensor], filling: int) -> Tensor:
        wide = [pad(tensor, (0, length - tensor.shape[1]), value=filling) for tensor in tensors]
        return torch.cat(wide)[order]

    labels, segments = [part.labels for part in parts], [part.segments for part in parts]
    known = [each for each in labels if each is not None]
    if known and not objective.of_sequences:
        together: Tensor | None = stacked(known, NO_LABEL)
    else:
        together = torch.cat(known)[order] if known else None
    told = [
        torch.zeros_like(part.token_ids) if each is None else each for part, each in zip(parts, segments, strict=True)
    ]
    mixed = packed_tokens(
        name,
        stacked([part.token_ids for part in parts], padding),
        stacked([part.loss_mask for part in parts], 0),
        stacked([part.valid for part in parts], 0),
        sum(part.tokens_available for part in parts),
        labels=together,
        segments=stacked(told, 0) if any(each is not None for each in segments) else None,
    )
    texts = [text for part in parts for text in part.texts or ()]
    together_texts = _chosen(tuple(texts), order) if all(part.texts is not None for part in parts) else None
    return replace(mixed, objective=objective, documents=_joined_documents(parts, order), texts=together_texts)


def _chosen(texts: tuple[str, ...] | None, rows: Tensor | slice) -> tuple[str, ...] | None:
    """Return the texts [N] of some sequences, by number or by a mask [N] bool."""
    if texts is None:
        return None
    return tuple(texts[number] for number in torch.arange(len(texts))[rows].tolist())


def _joined_documents(parts: Sequence[PackedTokens], order: Tensor | slice) -> Tensor | None:
    """Return which document each sequence is of; None if each is one by itself."""
    if all(part.documents is None for part in parts):
        return None
    found, first = [], 0
    for part in parts:
        documents = torch.arange(part.sequences) if part.documents is None else part.documents
        found.append(first + documents)
        first += int(documents.max()) + 1
    return torch.cat(found)[order]
