"""Reading of the teacher's answers from the shards of a complete cache, by sequence."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layer_surgery.disk.reading import why
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.healing.losses.inputs import TeacherLogits
from layer_surgery.healing.teacher.bits import I64
from layer_surgery.healing.teacher.codebook import RecordReader

OPTION = "--teacher-cache"
#: Whatever is wrong with a file: it cannot be read, is no JSON or safetensors, or lacks something.
DAMAGE = (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError)
#: Where a shard says, in its metadata, by which codebook it was written.
BOOK = "codebook_sha256"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file with the records of consecutive sequences."""

    file: str
    first: int  #: Its first sequence.
    stop: int  #: The sequence behind its last.
    sha256: str
    nbytes: int


class TeacherRecords:
    """A complete cache, read by sequence. Holds the sizes of some shards; streams are read from the files."""

    def __init__(self, directory: Path, shards: Sequence[Shard], reader: RecordReader, book_sha256: str) -> None:
        self._directory, self._shards, self._reader = directory, list(shards), reader
        self._book_sha256 = book_sha256
        self._firsts = np.array([shard.first for shard in shards])
        self._index = functools.lru_cache(maxsize=32)(self._read_index)

    def read(self, sequences: Tensor | Sequence[int]) -> TeacherLogits:
        """Return the records of all tokens that carry loss in some sequences, sequence after sequence, in this order.

        A sequence may be asked for more than once. Raises `LayerSurgeryError` if a file has changed since the cache was
        opened, and `IndexError` for a sequence that is not there.
        """
        pieces: list[_Piece] = []
        for sequence in map(int, sequences):
            if not 0 <= sequence < self._shards[-1].stop:
                raise IndexError(f"sequence {sequence} of {self._shards[-1].stop}")
            shard = self._shards[int(np.searchsorted(self._firsts, sequence, side="right")) - 1]
            try:
                pieces.append(self._piece(shard, sequence - shard.first))
            except DAMAGE as error:
                raise LayerSurgeryError(
                    f"{OPTION}: {self._directory / shard.file} cannot be read ({reason(error)})."
                ) from error
        lengths = np.array([len(piece.stream) for piece in pieces], np.int64)
        offsets = 8 * (np.cumsum(lengths) - lengths)
        sampled = pieces and pieces[0].tails is None
        return self._reader.read(
            _joined([piece.stream for piece in pieces], np.uint8),
            _joined([piece.starts + offset for piece, offset in zip(pieces, offsets, strict=True)], np.int64),
            _joined([piece.ends + offset for piece, offset in zip(pieces, offsets, strict=True)], np.int64),
            None if sampled else _joined([piece.tails for piece in pieces if piece.tails is not None], np.int64),
        )

    def _piece(self, shard: Shard, position: int) -> _Piece:
        index = self._index(shard.file)
        tokens = slice(index.tokens[position], index.tokens[position + 1])
        places = index.places[tokens.start : tokens.stop + 1]
        first_byte = int(places[0]) // 8
        with safe_open(self._directory / shard.file, framework="numpy") as file:
            self._check_book(file)
            stream = file.get_slice("stream")[first_byte : (int(places[-1]) + 7) // 8]
        inside = places - 8 * first_byte
        return _Piece(stream, inside[:-1], inside[1:], None if index.tails is None else index.tails[tokens])

    def _check_book(self, file: Any) -> None:
        """Raise `ValueError` if an open shard has been written by another codebook since the cache was opened."""
        if (file.metadata() or {}).get(BOOK) != self._book_sha256:
            raise ValueError("another run has captured it again since")

    def _read_index(self, file: str) -> _Index:
        with safe_open(self._directory / file, framework="numpy") as tensors:
            self._check_book(tensors)
            names = set(tensors.keys())
            bits, counts = tensors.get_tensor("bits"), tensors.get_tensor("tokens")
            tails = tensors.get_tensor("tails").astype(np.int64) if "tails" in names else None
        return _Index(_from_zero(counts), _from_zero(bits), tails)


@dataclass(frozen=True)
class _Index:
    """Where sequences and tokens of a shard are."""

    tokens: I64  #: [sequences + 1] the first token of each sequence.
    places: I64  #: [tokens + 1] the first bit of each token.
    tails: I64 | None  #: [tokens]


@dataclass(frozen=True)
class _Piece:
    """The records of one sequence."""

    stream: NDArray[np.uint8]
    starts: I64
    ends: I64
    tails: I64 | None


def reason(error: Exception) -> str:
    """Return what is wrong with a file, in words."""
    if isinstance(error, OSError):
        return why(error)
    return f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())


def _from_zero(sizes: NDArray[Any]) -> I64:
    return np.concatenate([[0], np.cumsum(sizes.astype(np.int64))])


def _joined(arrays: list[Any], dtype: Any) -> Any:
    return np.concatenate([np.zeros(0, dtype), *arrays])
