"""Several teachers of an embedding model: their vectors side by side.

Each teacher's vectors are made of length 1, put behind each other, and made of length 1 again, as in Jasper and Stella
(https://arxiv.org/abs/2412.19048), so that the cosine of two texts is the mean of what the teachers say. A teacher
that is not the original sees texts, not tokens: it has a tokenizer, a prompt and a length of its own.
Shapes: N texts, K teachers, E numbers of a teacher's vectors, T of all of them together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.functional import normalize

from layer_surgery.config import RuntimeConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError, UserError
from layer_surgery.evaluation.text_encoder import TextEncoder
from layer_surgery.healing.teacher.cache import TeacherIdentity
from layer_surgery.healing.teacher.rows import captured_rows, stored_rows
from layer_surgery.records import TeacherRecord
from layer_surgery.runs.provenance import checkpoint_hash
from layer_surgery.runs.session import Model, Session, open_session


@dataclass(frozen=True)
class Teacher:
    """An embedding model beside the original, or in its place."""

    session: Session
    sha256: str  #: Of the checkpoint, with what is behind its transformer.

    def vectors(self, tokens: PackedTokens, cache: Path | None) -> Tensor:
        """Return its vectors of what the sequences say, [N, E] float32, from the cache or asked for now.

        Raises `NumericalError` for a vector that is not finite or 0.
        """
        assert tokens.texts is not None, "the sequences are texts"
        identity = self._identity(tokens.texts)
        key = hashlib.sha256(json.dumps(asdict(identity), sort_keys=True).encode()).hexdigest()[:24]
        file = cache / f"outputs-{key}.safetensors" if cache is not None else None
        session, items = self.session, [1] * tokens.sequences
        rows = stored_rows(file, identity, items, session.ui.note) if file is not None else None
        if rows is not None:
            return rows
        model = session.stream(session.checkpoint)
        encoder = TextEncoder(model, session.need_tokenizer(), session.settings)
        vectors = encoder.encode(tokens.texts, encoder.embedder.prompt, session.ui.progress)
        return captured_rows([vectors], file, identity)

    def record(self, *, original: bool) -> TeacherRecord:
        """Return what a record says of it."""
        checkpoint = self.session.checkpoint
        assert checkpoint.embedder is not None
        return TeacherRecord(
            name=checkpoint.name,
            sha256=self.sha256,
            dimensions=checkpoint.embedder.dimensions(checkpoint.hidden_size),
            original=original,
        )

    def _identity(self, texts: Sequence[str]) -> TeacherIdentity:
        """Return what the vectors are of: texts, not tokens."""
        vocabulary = self.session.need_tokenizer().get_vocab()
        return TeacherIdentity(
            teacher_sha256=self.sha256,
            tokenizer_sha256=_sha256(vocabulary),
            data_sha256=_sha256(["texts", *texts]),
            chat_template_sha256="",
        )


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """All teachers, where they are not the original alone."""

    others: tuple[Teacher, ...]  #: Those that see texts, in the user's order.
    with_original: bool  #: Whether the original is one too; it then comes first.
    dimensions: int  #: Numbers of the student's vectors.

    @property
    def sha256(self) -> list[str]:
        """The hashes of the others."""
        return [teacher.sha256 for teacher in self.others]

    def records(self, original: Session, sha256: str) -> list[TeacherRecord]:
        """Return what a record says of all of them, in their order."""
        every = [*[Teacher(original, sha256)] * self.with_original, *self.others]
        return [teacher.record(original=each < int(self.with_original)) for each, teacher in enumerate(every)]


@dataclass(frozen=True, kw_only=True)
class NamedTeachers:
    """What `--teacher` comes to."""

    original: Model | None  #: As the user names it; None: it is where the record of the surgery says.
    teachers: Teachers | None  #: None if the original alone is followed.


def open_teachers(
    given: Sequence[Any],
    session: Session,
    base_sha256: str,
    opening: Callable[[Any], RuntimeConfig],
    stack: ExitStack,
) -> NamedTeachers:
    """Open the teachers that a user names, until `stack` is left. One that is named alone is taken for the original.

    Args:
        session: of the result.
        base_sha256: hash of the original.
        opening: options that a model is opened with.

    Raises `UserError` for several teachers of a model that gives no embeddings, and `CheckpointError` for one that
    gives none itself.
    """
    if len(given) < 2:
        return NamedTeachers(original=given[0] if given else None, teachers=None)
    student = session.checkpoint
    if student.embedder is None:
        raise UserError(
            f"--teacher is given {len(given)} times, but {student.name} is a {student.head.words}; only an embedding "
            "model has several teachers, so give the original alone."
        )
    original, others = None, list[Teacher]()
    for model in given:
        runtime = attrs.evolve(opening(model), tokenizer=None)
        opened = replace(stack.enter_context(open_session(model, runtime, session.scratch)), ui=session.ui)
        sha256 = checkpoint_hash(opened)
        if original is None and sha256 == base_sha256:
            original = model
            continue
        embedder = opened.checkpoint.embedder
        if embedder is None or embedder.root is None:
            raise CheckpointError(
                f"--teacher {opened.checkpoint.name} says nowhere how it makes a vector of a text; give a directory of "
                "sentence-transformers (with modules.json)."
            )
        opened.need_tokenizer()
        others.append(Teacher(opened, sha256))
    dimensions = student.embedder.dimensions(student.hidden_size)
    teachers = Teachers(others=tuple(others), with_original=original is not None, dimensions=dimensions)
    return NamedTeachers(original=original, teachers=teachers)


def side_by_side(vectors: Sequence[Tensor], unlike: int) -> Tensor:
    """Return the vectors [N, T] of length 1 of several teachers, of theirs [N, E] of any length.

    A number that is always 0 is added where T would be `unlike`, the numbers of the student's vectors: it changes no
    cosine, and says that the two are not in one space.
    """
    together = normalize(torch.cat([normalize(each.float(), dim=1) for each in vectors], dim=1), dim=1)
    return torch.nn.functional.pad(together, (0, 1)) if together.shape[1] == unlike else together


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
