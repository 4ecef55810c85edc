"""Bits in a row: many short codes written at once, and read at many places at once. Knows numpy only.

The first bit of a stream is the highest of its first byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: Most bits of one code: a window of 64 begins at a whole byte.
MOST_BITS = 57
#: Bytes that must follow a stream, so that a window can be read at its end.
PADDING = 8

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


def pack(codes: U64, lengths: I64) -> NDArray[np.uint8]:
    """Return codes [n] of these lengths (1 to `MOST_BITS` bits each), one after the other, the last byte filled up."""
    ends = np.cumsum(lengths)
    if not len(codes):
        return np.zeros(0, np.uint8)
    total, starts = int(ends[-1]), ends - lengths
    words, offset = starts >> 6, starts & 63
    over = offset + lengths - 64  # bits that go to the next word, if above 0
    first = np.where(over > 0, codes >> _u64(over.clip(0)), codes << _u64((-over).clip(0)))
    stream = np.zeros((total + 63) // 64 + 1, np.uint64)
    begins = np.flatnonzero(np.diff(words, prepend=-1))
    stream[words[begins]] = np.add.reduceat(first, begins)  # the bits are apart, so that adding sets them
    split = over > 0
    stream[words[split] + 1] += codes[split] << _u64(64 - over[split])
    return stream.astype(">u8").view(np.uint8)[: (total + 7) // 8]


class Windows:
    """A stream as its next 64 bits at any place."""

    def __init__(self, stream: NDArray[np.uint8]) -> None:
        """Read a stream that `PADDING` bytes follow."""
        self._words: NDArray[np.uint64] = np.ndarray(
            (len(stream) - 7,), ">u8", buffer=np.ascontiguousarray(stream), strides=(1,)
        )

    def at(self, places: I64) -> U64:
        """Return the bits from these places [n] on, the first in the highest bit; `MOST_BITS` of them count."""
        words: U64 = self._words[places >> 3].astype(np.uint64)
        return words << _u64(places & 7)


def _u64(values: I64) -> U64:
    return values.astype(np.uint64)
