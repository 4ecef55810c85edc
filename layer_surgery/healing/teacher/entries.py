"""Entries of a record (token ids with levels) as bits, and back: a prefix code of gaps and levels.

The ids of a token are written in ascending order of their *rank*, which says how common an id is among the records, so
that most gaps are small and k ids cost log2(k!) bits less than in any order of their own. The codes of a gap depend on
how common the previous id is, those of a level on how common its own is, and both on the mass outside the record (a
token of which much is outside has many entries). All tokens of a call are decoded side by side, one entry a step.
Knows numpy only. Shapes: n tokens, e entries of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layer_surgery.healing.teacher.bits import I64, PADDING, Windows, pack
from layer_surgery.healing.teacher.prefix_code import LONGEST, PrefixCodes, symbol_and_length

#: Levels up to this one have symbols of their own; beyond, one symbol an octave.
_DIRECT = 8
_OCTAVES = 10
#: The highest level that can be written.
MOST_LEVEL = _DIRECT << _OCTAVES
_LEVEL_SYMBOLS = _DIRECT + _OCTAVES
#: Classes of tokens by the mass outside of the record.
CLASSES = 4


@dataclass(frozen=True)
class Entries:
    """Entries of n tokens, token after token; ranks ascend within a token."""

    counts: I64  #: [n]
    ranks: I64  #: [e] from 0.
    levels: I64  #: [e] from 1 to `MOST_LEVEL`.

    @property
    def tokens(self) -> I64:
        """The token of each entry [e]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


@dataclass(frozen=True)
class EntryCode:
    """Prefix codes of gaps and levels, fitted to some entries."""

    gaps: PrefixCodes  #: [rank octaves * CLASSES, gap symbols]
    levels: PrefixCodes  #: [rank octaves * CLASSES, level symbols]

    @classmethod
    def fitted(cls, entries: Entries, classes: I64, vocabulary: int) -> EntryCode:
        """Return the code that suits entries of tokens of these classes [n]."""
        parts, octaves = _Parts.of(entries, classes), vocabulary.bit_length() + 1
        return cls(
            PrefixCodes.fitted(_counts(parts.gap_context, parts.gap_symbol, octaves, 2 * vocabulary.bit_length())),
            PrefixCodes.fitted(_counts(parts.level_context, parts.level_symbol, octaves, _LEVEL_SYMBOLS)),
        )

    def size(self, entries: Entries, classes: I64) -> int:
        """Return how many bits entries take."""
        return int(self._coded(entries, classes)[1].sum())

    def encode(self, entries: Entries, classes: I64) -> tuple[NDArray[np.uint8], I64]:
        """Return the stream of entries and how many bits of it belong to each token [n]."""
        codes, lengths = self._coded(entries, classes)
        bits = np.bincount(entries.tokens, weights=lengths, minlength=len(entries.counts)).astype(np.int64)
        return pack(codes, lengths), bits

    def _coded(self, entries: Entries, classes: I64) -> tuple[NDArray[np.uint64], I64]:
        """Return the code [e] of each entry, and its length [e] in bits."""
        parts = _Parts.of(entries, classes)
        code, length = np.zeros(len(entries.ranks), np.uint64), np.zeros(len(entries.ranks), np.int64)
        pieces = (
            (
                self.gaps.words()[parts.gap_context, parts.gap_symbol],
                self.gaps.lengths[parts.gap_context, parts.gap_symbol],
            ),
            (parts.gap_rest, _gap_bits(parts.gap_symbol)),
            (
                self.levels.words()[parts.level_context, parts.level_symbol],
                self.levels.lengths[parts.level_context, parts.level_symbol],
            ),
            (parts.level_rest, _level_bits(parts.level_symbol)),
        )
        for value, bits in pieces:
            code = (code << bits.astype(np.uint64)) | value.astype(np.uint64)
            length += bits
        return code, length


class EntryReader:
    """An `EntryCode` with the tables to decode it by."""

    def __init__(self, code: EntryCode) -> None:
        self._gaps, self._levels = code.gaps.table(), code.levels.table()

    def decode(self, stream: NDArray[np.uint8], starts: I64, ends: I64, classes: I64) -> Entries:
        """Return the entries of n tokens.

        Args:
            stream: bits of the tokens and maybe others.
            starts: [n] place of each token's first bit.
            ends: [n] place behind its last.
            classes: [n] of the tokens.

        Raises `ValueError` if the bits are none of this code.
        """
        windows = Windows(np.concatenate([stream, np.zeros(PADDING, np.uint8)]))
        alive = np.flatnonzero(starts < ends)
        place, end, class_, rank = starts[alive], ends[alive], classes[alive], np.full(len(alive), -1)
        tokens, ranks, levels = [], [], []
        while len(alive):
            rank, level, place = self._step(windows, place, rank, class_)
            tokens.append(alive)
            ranks.append(rank)
            levels.append(level)
            more = place < end
            if not more.all():
                if (place > end).any():
                    raise ValueError("the entries of a token do not end where they should")
                alive, place, end, class_, rank = (each[more] for each in (alive, place, end, class_, rank))
        if not tokens:
            return Entries(np.zeros(len(starts), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        of = np.concatenate(tokens)
        order = np.argsort(of, kind="stable")
        counts = np.bincount(of, minlength=len(starts))
        return Entries(counts, np.concatenate(ranks)[order], np.concatenate(levels)[order])

    def _step(self, windows: Windows, place: I64, rank: I64, class_: I64) -> tuple[I64, I64, I64]:
        """Read one entry of each token: return its rank and level and the place behind it."""
        bits = windows.at(place)
        symbol, used = symbol_and_length(self._gaps[(_context(rank, class_) << LONGEST) + _head(bits, LONGEST)])
        rest = _gap_bits(symbol)
        octave = symbol >> 1
        rank = rank + (((1 << octave) | ((symbol & 1) << rest)) + _part(bits, used, rest))
        used += rest
        bits = bits << used.astype(np.uint64)
        symbol, length = symbol_and_length(self._levels[(_context(rank, class_) << LONGEST) + _head(bits, LONGEST)])
        rest = _level_bits(symbol)
        level = np.where(symbol < _DIRECT, symbol + 1, (1 << rest) + 1 + _part(bits, length, rest))
        return rank, level, place + used + length + rest


@dataclass(frozen=True)
class _Parts:
    """Entries as symbols with contexts, and what the symbols leave open [e]."""

    gap_context: I64
    gap_symbol: I64
    gap_rest: I64
    level_context: I64
    level_symbol: I64
    level_rest: I64

    @classmethod
    def of(cls, entries: Entries, classes: I64) -> _Parts:
        class_ = np.repeat(classes, entries.counts)
        before = np.concatenate([[-1], entries.ranks[:-1]])[: len(entries.ranks)]
        firsts = (np.cumsum(entries.counts) - entries.counts)[entries.counts > 0]
        before[firsts] = -1
        gap = entries.ranks - before
        octave = _octave(gap)
        half = np.where(octave > 0, (gap >> (octave - 1).clip(0)) & 1, 0)
        gap_symbol = 2 * octave + half
        gap_rest = gap & ((1 << _gap_bits(gap_symbol)) - 1)
        above = _octave(entries.levels - 1)
        level_symbol = np.where(entries.levels <= _DIRECT, entries.levels - 1, _DIRECT - 3 + above)
        level_rest = np.where(entries.levels <= _DIRECT, 0, entries.levels - 1 - (1 << above))
        return cls(
            _context(before, class_), gap_symbol, gap_rest, _context(entries.ranks, class_), level_symbol, level_rest
        )


def _gap_bits(symbol: I64) -> I64:
    """Return how many bits of a gap its symbol leaves open: the octave has one of two halves."""
    return ((symbol >> 1) - 1).clip(0)


def _level_bits(symbol: I64) -> I64:
    """Return how many bits of a level its symbol leaves open."""
    return np.where(symbol < _DIRECT, 0, symbol - _DIRECT + 3)


def _context(rank: I64, class_: I64) -> I64:
    """Return the context of an id of this rank (-1: none) in a token of this class."""
    return _octave(rank + 1, of_zero=-1) * CLASSES + CLASSES + class_


def _octave(values: I64, of_zero: int = 0) -> I64:
    """Return floor(log2) of whole numbers below 2^53."""
    _, exponent = np.frexp(values.astype(np.float64))
    return np.where(values > 0, exponent.astype(np.int64) - 1, of_zero)


def _counts(context: I64, symbol: I64, octaves: int, symbols: int) -> I64:
    flat = np.bincount(context * symbols + symbol, minlength=octaves * CLASSES * symbols)
    return flat.reshape(octaves * CLASSES, symbols)


def _head(bits: NDArray[np.uint64], count: int) -> I64:
    """Return the first bits of windows as numbers."""
    return (bits >> np.uint64(64 - count)).astype(np.int64)


def _part(bits: NDArray[np.uint64], skip: I64, count: I64) -> I64:
    """Return `count` bits of windows behind the first `skip`."""
    moved = bits << skip.astype(np.uint64)
    # Two shifts, because one by 64 is none.
    return ((moved >> np.uint64(1)) >> (63 - count).astype(np.uint64)).astype(np.int64)
