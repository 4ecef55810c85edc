"""Prefix codes of bounded length, one for each context, and how they are read with one table lookup. Knows numpy only.

Huffman, A Method for the Construction of Minimum-Redundancy Codes (1952); canonical, so that lengths say everything.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Bits of the longest code word: a table of all beginnings has 4,096 entries a context.
LONGEST = 12
_LENGTH_BITS = 4


@dataclass(frozen=True)
class PrefixCodes:
    """A code over the same symbols in each context."""

    lengths: NDArray[np.uint8]  #: [contexts, symbols], 1 to `LONGEST`.

    @classmethod
    def fitted(cls, counts: NDArray[np.int64]) -> PrefixCodes:
        """Return the codes that suit counts [contexts, symbols]; what was never seen can be written, too."""
        return cls(np.stack([_code_lengths(row) for row in counts]))

    def words(self) -> NDArray[np.uint16]:
        """Return the code words [contexts, symbols]: equal lengths in the order of the symbols, shorter ones first."""
        words = np.zeros(self.lengths.shape, np.uint16)
        for row, lengths in zip(words, self.lengths, strict=True):
            order = np.argsort(lengths, kind="stable")
            shares = np.int64(1) << (LONGEST - lengths[order].astype(np.int64))
            beginnings = np.cumsum(shares) - shares
            row[order] = beginnings >> (LONGEST - lengths[order])
        return words

    def table(self) -> NDArray[np.uint16]:
        """Return, for each context and each of the next `LONGEST` bits, `symbol << 4 | length`, as one row."""
        table = np.zeros((len(self.lengths), 1 << LONGEST), np.uint16)
        for row, lengths in zip(table, self.lengths, strict=True):
            order = np.argsort(lengths, kind="stable")
            entries = (order << _LENGTH_BITS | lengths[order]).astype(np.uint16)
            row[:] = np.repeat(entries, 1 << (LONGEST - lengths[order].astype(np.int64)))
        return table.reshape(-1)


def symbol_and_length(entries: NDArray[np.uint16]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return what table entries say."""
    wide = entries.astype(np.int64)
    return wide >> _LENGTH_BITS, wide & ((1 << _LENGTH_BITS) - 1)


def _code_lengths(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return lengths [symbols] of a complete code; counts are levelled until none is longer than `LONGEST`."""
    weights = [int(count) * len(counts) + 1 for count in counts]
    while True:
        lengths = _huffman(weights)
        if max(lengths) <= LONGEST:
            return np.array(lengths, np.uint8)
        weights = [weight // 2 + 1 for weight in weights]


def _huffman(weights: list[int]) -> list[int]:
    """Return the depth of each symbol in a Huffman tree; two symbols at least."""
    heap: list[tuple[int, int]] = [(weight, leaf) for leaf, weight in enumerate(weights)]
    heapq.heapify(heap)
    parents: dict[int, int] = {}
    for node in range(len(weights), 2 * len(weights) - 1):
        (one, left), (other, right) = heapq.heappop(heap), heapq.heappop(heap)
        parents[left] = parents[right] = node
        heapq.heappush(heap, (one + other, node))
    depths = {2 * len(weights) - 2: 0}
    for node in range(2 * len(weights) - 3, -1, -1):
        depths[node] = depths[parents[node]] + 1
    return [depths[leaf] for leaf in range(len(weights))]
