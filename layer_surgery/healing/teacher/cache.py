"""The teacher's answers on disk: captured once, in shards; `records.py` reads them while a student is trained.

A directory holds `teacher.json` (of what it was made, and the SHA-256 of every other file), `codebook.safetensors` and
shards. Finished shards are kept whatever happens, and capturing goes on behind them. Nothing that is damaged is used:
every byte is checked when the cache is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from layer_surgery.disk.own import remove_dead
from layer_surgery.disk.reading import check_regular, read_json
from layer_surgery.disk.writing import staged_file, write_atomically
from layer_surgery.errors import LayerSurgeryError, UserError
from layer_surgery.healing.teacher.codebook import Codebook, RecordReader
from layer_surgery.healing.teacher.form import Observed, RecordForm, observe
from layer_surgery.healing.teacher.records import BOOK, DAMAGE, OPTION, Shard, TeacherRecords, reason
from layer_surgery.machine import code_sha256

HEADER_FILE, CODEBOOK_FILE = "teacher.json", "codebook.safetensors"
#: What directories begin with that hold a file which is being written.
STAGING = ".teacher.partial-"
#: A shard is finished behind the sequence in which it gets so many tokens.
SHARD_TOKENS = 1 << 14
#: Files that are there before the first header: a capture may be killed between them, or be at work.
_OURS = re.compile(rf"{re.escape(CODEBOOK_FILE)}|shard-\d+\.safetensors|{re.escape(STAGING)}\w+|\..*\.partial(-\w+)?")


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """What the records of a cache are of; two caches with equal ones are interchangeable."""

    teacher_sha256: str
    tokenizer_sha256: str
    data_sha256: str  #: Of the packed tokens, as `PackedTokens.sha256`.
    chat_template_sha256: str = ""  #: "" where there is none.
    code_sha256: str = field(default_factory=code_sha256)


_WHAT_DIFFERS = {
    "teacher_sha256": "another teacher",
    "tokenizer_sha256": "another tokenizer",
    "data_sha256": "other data",
    "chat_template_sha256": "another chat template",
    "code_sha256": "another release of layer-surgery",
}


class TeacherCache:
    """The records of the tokens that carry loss, sequence after sequence, as far as they are captured."""

    def __init__(
        self, directory: Path, identity: TeacherIdentity, form: RecordForm, tokens: Sequence[int], vocabulary: int
    ) -> None:
        """Hold an empty cache; use `open`."""
        self._directory, self._identity, self._form = directory, identity, form
        self._tokens, self._vocabulary = [int(count) for count in tokens], vocabulary
        self._shards: list[Shard] = []
        self._book: Codebook | None = None
        self._book_sha256 = ""

    @classmethod
    def open(
        cls,
        directory: Path,
        identity: TeacherIdentity,
        *,
        tokens: Sequence[int],
        vocabulary: int,
        form: RecordForm | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> Self:
        """Return the cache in a directory, which is made if it is not there; checks every byte of one that is.

        Args:
            directory: of this cache alone.
            identity: what the records are to be of.
            tokens: [N] how many tokens of each sequence carry loss.
            vocabulary: size of the teacher's.
            form: of the records.
            note: is told what is captured again because it is damaged.

        Raises `UserError`: the directory cannot be made or written, holds something else, or a cache of something else.
        """
        cache = cls(directory, identity, form or RecordForm(), tokens, vocabulary)
        header = directory / HEADER_FILE
        remove_dead(directory, STAGING)
        if header.exists():
            cache._read(header, note)
        elif directory.is_dir() and any(_OURS.fullmatch(path.name) is None for path in directory.iterdir()):
            raise UserError(f"{OPTION} {directory} is not empty and no teacher cache; give another directory.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{OPTION} {directory} cannot be made ({error.strerror}); give another.") from error
        if not os.access(directory, os.W_OK | os.X_OK) and not cache.complete:
            raise UserError(f"{OPTION} {directory} cannot be written; give another directory.")
        return cache

    @property
    def next_sequence(self) -> int:
        """The first sequence that is not captured yet."""
        return self._shards[-1].stop if self._shards else 0

    @property
    def complete(self) -> bool:
        return self.next_sequence == len(self._tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self._shards)

    def capture(self, logits: Iterable[Tensor]) -> None:
        """Write the records of all sequences from `next_sequence` on.

        What is finished stays if this is interrupted, and `open` with the same arguments goes on behind it.

        Args:
            logits: [n, V] of consecutive tokens that carry loss, beginning with the first of sequence `next_sequence`,
                in pieces of any size.

        Raises `LayerSurgeryError` if a file cannot be written (the disk is full), and `ValueError` if the logits are
        not those of all the tokens.
        """
        self.write(self._observed(logits))

    def _observed(self, logits: Iterable[Tensor]) -> Iterator[Observed]:
        seen = sum(self._tokens[: self.next_sequence])
        for piece in logits:
            if piece.shape[1] != self._vocabulary:
                raise ValueError(f"logits over {piece.shape[1]} tokens, and the vocabulary has {self._vocabulary}")
            yield observe(piece, self._form, seen)
            seen += len(piece)

    def write(self, pieces: Iterable[Observed]) -> None:
        """Do the same with what `observe` has made of the logits."""
        pending, waiting = list[Observed](), 0
        for piece in pieces:
            pending.append(piece)
            waiting += len(piece.counts)
            while (stop := self._shard_stop()) is not None and waiting >= sum(self._tokens[self.next_sequence : stop]):
                waiting, pending = self._write_shard(pending, stop)
        if waiting or not self.complete:
            missing = sum(self._tokens[self.next_sequence :]) - waiting
            raise ValueError(f"{missing} tokens of the teacher are missing" if missing > 0 else "too many logits")

    def records(self) -> TeacherRecords:
        """Return what is read by sequence. Raises `ValueError` unless the cache is complete."""
        if not self.complete or self._book is None:
            raise ValueError(f"{self.next_sequence} of {len(self._tokens)} sequences are captured")
        reader = RecordReader(self._book, self._form.temperature)
        return TeacherRecords(self._directory, self._shards, reader, self._book_sha256)

    def _shard_stop(self) -> int | None:
        """Return the sequence behind the last of the next shard; None if there is none."""
        if self.complete:
            return None
        count = 0
        for index in range(self.next_sequence, len(self._tokens)):
            count += self._tokens[index]
            if count >= SHARD_TOKENS:
                return index + 1
        return len(self._tokens)

    def _write_shard(self, pending: list[Observed], stop: int) -> tuple[int, list[Observed]]:
        """Write the next shard; return how many tokens behind it are waiting, and what was seen of them."""
        first, joined = self.next_sequence, Observed.joined(pending)
        counts = np.array(self._tokens[first:stop], np.int64)
        mine, rest = joined.split(int(counts.sum()))
        if self._book is None:
            self._book = Codebook.fitted(mine, self._form, self._vocabulary)
            self._book_sha256 = self._save(CODEBOOK_FILE, self._book.arrays(), {})
        coded = self._book.encode(mine)
        arrays: dict[str, NDArray[Any]] = {"stream": coded.stream, "bits": coded.bits.astype(np.uint16)}
        arrays["tokens"] = counts.astype(np.int32)
        if coded.tails is not None:
            arrays["tails"] = coded.tails.astype(np.uint16)
        name = f"shard-{len(self._shards):05d}.safetensors"
        sha256 = self._save(name, arrays, {BOOK: self._book_sha256})
        nbytes = (self._directory / name).stat().st_size
        self._shards.append(Shard(file=name, first=first, stop=stop, sha256=sha256, nbytes=nbytes))
        try:
            self._write_header()
        except OSError as error:
            self._shards.pop()
            raise self._unwritable(error) from error
        return len(rest.counts), [rest]

    def _save(self, name: str, arrays: Mapping[str, NDArray[Any]], about: dict[str, str]) -> str:
        """Write a file, under its name only when it is whole, and return its SHA-256."""
        try:
            with staged_file(self._directory / name, STAGING) as staging:
                save_file(dict(arrays), staging, about)
                return _sha256(staging)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

    def _write_header(self) -> None:
        record = self._header()
        text = json.dumps({"sha256": _record_sha256(record), "record": record})
        write_atomically(self._directory / HEADER_FILE, text)

    def _header(self) -> dict[str, Any]:
        return {
            "identity": asdict(self._identity),
            "form": self._form.to_dict(),
            "sequences": len(self._tokens),
            "tokens": sum(self._tokens),
            "vocabulary": self._vocabulary,
            "codebook_sha256": self._book_sha256,
            "shards": [asdict(shard) for shard in self._shards],
        }

    def _unwritable(self, error: Exception) -> LayerSurgeryError:
        return LayerSurgeryError(
            f"{OPTION} {self._directory} cannot be written ({reason(error)}); is the disk full? The "
            f"{self.next_sequence} of {len(self._tokens)} sequences that are captured stay: make room and run the same "
            "command again."
        )

    def _read(self, header: Path, note: Callable[[str], None]) -> None:
        """Take over what a directory holds. Raises `UserError` if that is of something else, or none of ours."""
        try:
            stored = read_json(header)
            record = stored["record"]
            if stored["sha256"] != _record_sha256(record):
                raise ValueError("its checksum is wrong")
            shards = [Shard(**shard) for shard in record["shards"]]
            _check_shards(shards, record["sequences"])
            identity, form = dict(record["identity"]), dict(record["form"])
            counts = (record["sequences"], record["tokens"], record["vocabulary"])
            self._book_sha256 = record["codebook_sha256"]
        except DAMAGE as error:
            raise UserError(
                f"{OPTION} {self._directory} has a damaged {HEADER_FILE} ({reason(error)}); delete the directory to "
                "capture again, or give another."
            ) from error
        self._refuse_other(identity, form, counts)
        try:
            if _sha256(self._directory / CODEBOOK_FILE) != self._book_sha256:
                raise ValueError("its checksum is wrong")
            self._book = Codebook.from_arrays(load_file(self._directory / CODEBOOK_FILE))
        except DAMAGE as error:
            note(
                f"warning: {self._directory / CODEBOOK_FILE} is damaged ({reason(error)}); the teacher is captured "
                "again"
            )
            self._book, self._book_sha256 = None, ""
            return
        for shard in shards:
            if not self._whole(shard):
                note(
                    f"warning: {self._directory / shard.file} is damaged or missing; the teacher is captured again "
                    f"from sequence {shard.first} of {len(self._tokens)} on"
                )
                return
            self._shards.append(shard)

    def _refuse_other(self, identity: dict[str, Any], form: dict[str, Any], counts: tuple[Any, ...]) -> None:
        mine, other = asdict(self._identity), ""
        differs = [name for name in mine if identity.get(name) != mine[name]]
        if differs:
            other = _WHAT_DIFFERS[differs[0]]
        elif form != self._form.to_dict():
            asked = self._form.to_dict()
            name = next(name for name in {**asked, **form} if form.get(name) != asked.get(name))
            other = f"{name} {form.get(name)} where {asked.get(name)} is asked for"
        elif counts != (len(self._tokens), sum(self._tokens), self._vocabulary):
            other = "other data"
        if other:
            raise UserError(
                f"{OPTION} {self._directory} was captured with {other}; give another directory, or delete this one to "
                "capture again."
            )

    def _whole(self, shard: Shard) -> bool:
        path = self._directory / shard.file
        try:
            return Path(shard.file).name == shard.file and _sha256(path) == shard.sha256
        except OSError:
            return False


def captured(directory: Path) -> int:
    """Return how many sequences the cache in a directory says that it holds; 0 if there is none that can be read."""
    try:
        shards = read_json(directory / HEADER_FILE)["record"]["shards"]
        return int(shards[-1]["stop"]) if shards else 0
    except (OSError, *DAMAGE):
        return 0


def _record_sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _check_shards(shards: Sequence[Shard], sequences: int) -> None:
    """Raise `ValueError` unless shards stand one behind the other, and none behind the last sequence."""
    stops = [0, *(shard.stop for shard in shards)]
    whole = all(type(each) is int for shard in shards for each in (shard.first, shard.stop, shard.nbytes))
    if not whole or any(
        shard.first != stop or not stop < shard.stop <= sequences for shard, stop in zip(shards, stops, strict=False)
    ):
        raise ValueError("its shards are none")


def _sha256(path: Path) -> str:
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
