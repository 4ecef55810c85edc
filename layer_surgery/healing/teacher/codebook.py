"""The codebook: how the records of one cache are written, fitted to the first of them.

Shapes: n tokens, V vocabulary, e entries of all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from layer_surgery.healing.losses.inputs import TeacherLogits
from layer_surgery.healing.teacher.bits import I64
from layer_surgery.healing.teacher.entries import CLASSES, MOST_LEVEL, Entries, EntryCode, EntryReader
from layer_surgery.healing.teacher.form import TAIL_SCALE, THRESHOLD, Observed, RecordForm
from layer_surgery.healing.teacher.prefix_code import PrefixCodes

#: Bytes of a token beside its entries: their number of bits, and the tail.
_BITS_BYTES, _TAIL_BYTES = 2, 2
#: Steps between which the one that gives the bytes asked for is looked for, and how often their distance is halved.
_FINEST, _COARSEST, _HALVINGS = 1 / MOST_LEVEL, 0.5, 12
#: Most tokens that it is looked for on, and how many of them in a row are of one half.
_SEARCHED, _BLOCK = 8192, 64


class Coded(NamedTuple):
    """Records of n tokens as they are stored."""

    stream: NDArray[np.uint8]
    bits: I64  #: [n] of the stream, token after token.
    tails: I64 | None  #: [n] roots of the mass outside, in units of 1 / `TAIL_SCALE`; None for a sample.

    @property
    def nbytes(self) -> int:
        return len(self.stream) + len(self.bits) * (_BITS_BYTES + (_TAIL_BYTES if self.tails is not None else 0))


@dataclass(frozen=True)
class Codebook:
    """How ids, probabilities and tails become bits, and back."""

    step: float  #: Of the root of a probability; of a sample, 0.
    ids: I64  #: [V] ids from the commonest to the rarest in the records that it is fitted to.
    probabilities: NDArray[np.float32]  #: [levels + 1] mean probability of what has this level.
    class_limits: I64  #: [CLASSES - 1] tails, as they are stored, from which on a token is of the next class.
    code: EntryCode

    @classmethod
    def fitted(cls, observed: Observed, form: RecordForm, vocabulary: int) -> Codebook:
        """Return the codebook that suits some tokens; for `top_k` its step gives them the bytes asked for."""
        if form.form == "sampled":
            return cls._of_step(observed, form, vocabulary, 0.0)
        # Fitted to one half and measured on the other: tokens to come have ids that these have not.
        some, _ = observed.split(_SEARCHED)
        odd = np.arange(len(some.counts)) // _BLOCK % 2 == 1
        one, other = (some.of(~odd), some.of(odd)) if odd.any() else (some, some)
        low, high = np.log(_FINEST), np.log(_COARSEST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            book = cls._of_step(one, form, vocabulary, float(np.exp(middle)))
            too_many = book.encode(other).nbytes > form.bytes_per_token * len(other.counts)
            low, high = (middle, high) if too_many else (low, middle)
        return cls._of_step(observed, form, vocabulary, float(np.exp(high)))

    @classmethod
    def _of_step(cls, observed: Observed, form: RecordForm, vocabulary: int, step: float) -> Codebook:
        levels, kept, tails = _levels(observed, step)
        counted = np.bincount(observed.ids[kept], minlength=vocabulary)
        ids = np.argsort(-counted, kind="stable")
        limits = np.quantile(tails, np.arange(1, CLASSES) / CLASSES).astype(np.int64)
        entries = _ranked(observed.where(kept), levels[kept], ids)
        return cls(
            step,
            ids,
            _probabilities(observed.values[kept], levels[kept], step, form.samples),
            limits,
            EntryCode.fitted(entries, _classes(tails, limits), vocabulary),
        )

    def encode(self, observed: Observed) -> Coded:
        """Return the records of some tokens."""
        levels, kept, tails = _levels(observed, self.step)
        entries = _ranked(observed.where(kept), levels[kept], self.ids)
        stream, bits = self.code.encode(entries, _classes(tails, self.class_limits))
        return Coded(stream, bits, tails if self.step else None)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the codebook as named arrays."""
        return {
            "step": np.array([self.step]),
            "ids": self.ids.astype(np.int32),
            "probabilities": self.probabilities,
            "class_limits": self.class_limits.astype(np.int32),
            "gap_lengths": self.code.gaps.lengths,
            "level_lengths": self.code.levels.lengths,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Codebook:
        """Return the codebook that `arrays` is of. Raises `KeyError` and `ValueError` if it is of none."""
        return cls(
            float(arrays["step"][0]),
            arrays["ids"].astype(np.int64),
            arrays["probabilities"],
            arrays["class_limits"].astype(np.int64),
            EntryCode(PrefixCodes(arrays["gap_lengths"]), PrefixCodes(arrays["level_lengths"])),
        )


class RecordReader:
    """A codebook with the tables to decode records by."""

    def __init__(self, book: Codebook, temperature: float) -> None:
        self._book, self._temperature, self._reader = book, temperature, EntryReader(book.code)

    def read(self, stream: NDArray[np.uint8], starts: I64, ends: I64, tails: I64 | None) -> TeacherLogits:
        """Return the records of n tokens.

        Args:
            stream: bits of the tokens and maybe others.
            starts: [n] place of each token's first bit.
            ends: [n] place behind its last.
            tails: [n] as stored; None for a sample.
        """
        zeros = np.zeros(len(starts), np.int64)
        classes = _classes(zeros if tails is None else tails, self._book.class_limits)
        entries = self._reader.decode(stream, starts, ends, classes)
        mass = self._book.probabilities[entries.levels].astype(np.float64)
        outside = None if tails is None else (tails / TAIL_SCALE) ** 2
        tokens = entries.tokens
        total = np.bincount(tokens, weights=mass, minlength=len(starts)) + (0 if outside is None else outside)
        total = np.where(total > 0, total, 1.0)
        width = max(1, int(entries.counts.max(initial=0)))
        places = (
            tokens * width
            + np.arange(len(tokens))
            - np.repeat(np.cumsum(entries.counts) - entries.counts, entries.counts)
        )
        ids = np.full(len(starts) * width, -1, np.int64)
        ids[places] = self._book.ids[entries.ranks]
        log_probs = np.full(len(starts) * width, -np.inf, np.float32)
        log_probs[places] = np.log(mass / total[tokens])
        with np.errstate(divide="ignore"):
            tail = None if outside is None else np.log(outside / total).astype(np.float32)
        return TeacherLogits(
            torch.from_numpy(log_probs).view(-1, width),
            torch.from_numpy(ids).view(-1, width),
            None if tail is None else torch.from_numpy(tail),
            temperature=self._temperature,
        )


def _levels(observed: Observed, step: float) -> tuple[I64, NDArray[np.bool_], I64]:
    """Return the level of each entry [e], which are kept [e], and the tails [n] that this leaves, as stored."""
    if not step:
        levels = observed.values.astype(np.int64)
        return levels, levels > 0, np.zeros(len(observed.counts), np.int64)
    roots = np.sqrt(observed.values) / step
    levels = np.rint(roots).astype(np.int64).clip(1, MOST_LEVEL)
    kept = roots >= THRESHOLD
    inside = np.bincount(observed.tokens[kept], weights=observed.values[kept], minlength=len(observed.counts))
    return levels, kept, np.rint(np.sqrt((1 - inside).clip(0)) * TAIL_SCALE).astype(np.int64)


def _ranked(observed: Observed, levels: I64, ids: I64) -> Entries:
    """Return entries with the ranks of their ids in `ids` [V], ascending in each token."""
    rank_of = np.empty(len(ids), np.int64)
    rank_of[ids] = np.arange(len(ids))
    ranks = rank_of[observed.ids]
    order = np.argsort(observed.tokens * len(ids) + ranks)
    return Entries(observed.counts, ranks[order], levels[order])


def _probabilities(values: NDArray[np.float64], levels: I64, step: float, samples: int) -> NDArray[np.float32]:
    """Return the mean probability of each level [levels + 1]; where there is none, the middle of the level."""
    if not step:
        return (np.arange(samples + 1) / samples).astype(np.float32)
    every = np.arange(int(np.ceil(1 / step)) + 1)
    counted = np.bincount(levels, minlength=len(every))
    sums = np.bincount(levels, weights=values, minlength=len(every))
    middles = (every * step) ** 2 + step**2 / 12
    return np.where(counted > 0, sums / counted.clip(1), middles).astype(np.float32)


def _classes(tails: I64, limits: I64) -> I64:
    return np.searchsorted(limits, tails, side="right")
