"""What a healing takes of the original: its answers, its probabilities and its hidden states, each once."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from layer_surgery import parallel
from layer_surgery.config import HealingConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.disk.locks import LockedError, lock_file, locked
from layer_surgery.disk.reading import why
from layer_surgery.errors import LayerSurgeryError, NumericalError
from layer_surgery.healing.capture import DenseTeacher, KeptStore, Reduce, TeacherStatesStore, asked
from layer_surgery.healing.losses.registry import Needs
from layer_surgery.healing.relations import Relations, TeacherAttentionStore, last_attention
from layer_surgery.healing.rewrite import greedy, load_rewritten, prompts, rewritten, save_rewritten
from layer_surgery.healing.student import Student
from layer_surgery.healing.teacher.cache import TeacherCache, TeacherIdentity, captured
from layer_surgery.healing.teacher.form import Observed, RecordForm, observe
from layer_surgery.healing.teacher.rows import TeacherRows, captured_rows, stored_rows
from layer_surgery.healing.windows import HealingData
from layer_surgery.runs.healing.prepare import PreparedHealing, stop_tokens
from layer_surgery.runs.healing.teachers import side_by_side
from layer_surgery.runs.session import Session
from layer_surgery.walk.boundaries import BoundaryStore
from layer_surgery.walk.finite import remedy
from layer_surgery.walk.streamed import StreamedModel


class Asking:
    """The original, asked once for what the losses need, and where its outputs are kept meanwhile."""

    def __init__(
        self,
        session: Session,
        teacher: Session,
        teacher_sha256: str,
        prepared: PreparedHealing,
        pairs: Sequence[tuple[int, int]],
        kept: ExitStack,
    ) -> None:
        """Ask the original that `teacher` has opened, and the other teachers that were prepared.

        Args:
            session: whose scratch files are used.
            pairs: layers of student and original whose states belong together.
            kept: closed when nothing is looked at any more.
        """
        self._prepared = prepared
        self._session, self._teacher, self._teacher_sha256 = session, teacher, teacher_sha256
        self._config, self._losses = prepared.config, prepared.losses
        self._pairs, self._kept, self._kept_temperature = pairs, kept, prepared.kept_temperature
        self.bytes_per_token: float | None = None  #: That the largest probabilities of the original take.

    def rewritten(self, data: HealingData) -> HealingData:
        """Have the original answer the prompts of the data, or take its answers from the cache."""
        tokens, stops = data.train, stop_tokens(self._teacher)
        folder = self._config.teacher_cache or self._session.new_scratch("answers")
        key = _sha256(f"{self._teacher_sha256} {tokens.sha256} {sorted(stops)}")[:24]
        file = folder / f"answers-{key}.safetensors"
        known = parallel.from_first(lambda: load_rewritten(tokens, file) is not None)
        if not known:
            model = self._teacher.stream(self._teacher.checkpoint)
            if parallel.is_first():
                count = len(prompts(tokens, stops))
                with self._session.ui.progress("answering prompts", count) as advance:
                    answers = greedy(model.load_whole(), stops)
                    save_rewritten(*rewritten(tokens, answers, stops, advance), file)
            parallel.barrier()
        found = load_rewritten(tokens, file)
        if found is None:
            raise LayerSurgeryError(f"the answers of the original in {file} cannot be read again; run this once more.")
        answered, count = found
        self._session.ui.note(f"healing: {count:,} answers of {answered.sequences:,} are the original's own")
        return replace(data, train=answered)

    def ask(self, student: Student, data: HealingData) -> HealingData:
        """Take what the losses need of the original, once, and give it to the student.

        Returns the data, of an embedding model with the original's vectors as the labels of what is trained on.
        """
        needs = {loss.entry.needs for loss in self._losses}
        tokens = data.train
        if self._config.both_models:  # what else losses look at is found in each step
            return replace(data, train=self.embedded(tokens)) if tokens.objective.problem == "embedding" else data
        layers = [layer for _, layer in self._pairs] if "states" in needs else []
        if tokens.objective.problem == "embedding":
            student.states = self._states(tokens, layers) if layers else None
            return replace(data, train=self._embedded(tokens, [student.states] if student.states else []))
        if needs & {"logits", "states", "relations"}:
            self._ask_head(student, tokens, needs, layers)
        return data

    def embedded(self, tokens: PackedTokens) -> PackedTokens:
        """Return texts with the vectors that an original which embeds gives for them as their labels."""
        return self._embedded(tokens, [])

    def _embedded(self, tokens: PackedTokens, stores: Sequence[KeptStore]) -> PackedTokens:
        others = self._prepared.teachers
        if others is None:
            vectors = self._original_vectors(tokens, stores)
        else:
            found = [self._original_vectors(tokens, stores)] if others.with_original or stores else []
            cache = self._config.teacher_cache
            theirs = [teacher.vectors(tokens, cache) for teacher in others.others]
            vectors = side_by_side([*found[: int(others.with_original)], *theirs], others.dimensions)
        self.bytes_per_token = float(vectors.shape[1] * vectors.dtype.itemsize)
        return replace(tokens, labels=vectors)

    def _original_vectors(self, tokens: PackedTokens, stores: Sequence[KeptStore]) -> Tensor:
        vectors = self._whole_outputs(tokens, [1] * tokens.sequences, stores)
        bad = ~torch.isfinite(vectors).all(dim=1) | (vectors == 0).all(dim=1)
        if bad.any():
            raise NumericalError(
                f"the embeddings that {self._teacher.checkpoint.name} gives for {int(bad.sum())} of {len(bad)} texts "
                f"of '{tokens.name}' are not finite or 0; {remedy(self._teacher.dtype)}."
            )
        return vectors

    def _ask_head(self, student: Student, tokens: PackedTokens, needs: set[Needs], layers: list[int]) -> None:
        """Take outputs, states and relations of an original that has a head."""
        depth = self._teacher.checkpoint.layer_count
        classifier, temperature = tokens.objective.labelled, self._kept_temperature
        whole = "logits" in needs and temperature is None and not classifier
        if whole and depth - 1 not in layers:
            layers.append(depth - 1)
        model = self._teacher.stream(self._teacher.checkpoint)
        states = self._states(tokens, layers) if layers else None
        relations = self._relations(tokens, model.dtype) if "relations" in needs else None
        stores: list[KeptStore] = [store for store in (states, relations) if store is not None]
        if classifier and "logits" in needs:
            items = tokens.loss_mask.sum(dim=1).tolist()
            rows = self._whole_outputs(tokens, items, stores)
            student.outputs = TeacherRows(rows, items, tokens.objective)
            self.bytes_per_token = float(rows.shape[1] * rows.dtype.itemsize)
        elif "logits" in needs and temperature is not None:
            self._ask_language_model(student, model, tokens, temperature, stores)
        else:
            for _ in self._kept_of(model, tokens, slice(0, tokens.sequences), None, stores):
                pass
        student.states = states if "states" in needs else None
        student.relations = Relations(student.checkpoint, relations) if relations is not None else None
        if whole and states is not None:
            student.outputs = DenseTeacher(model, tokens, states)

    def _ask_language_model(
        self,
        student: Student,
        model: StreamedModel,
        tokens: PackedTokens,
        temperature: float,
        stores: Sequence[KeptStore],
    ) -> None:
        """Keep the largest probabilities of each token; the first process writes what all have found."""
        folder, form = self._cache_folder(tokens, temperature), RecordForm(temperature=temperature)
        spare = self._session.new_scratch("teacher")
        caches: list[TeacherCache] = []

        def next_sequence() -> tuple[str, int]:
            for place in (folder, spare):
                cache = self._open_cache(place, model, tokens, form, self._session.ui.note)
                if cache.complete:
                    _remove_dead_lock(place)
                elif self._alone_in(place):
                    # Another run may have written to it before it was locked.
                    cache = self._open_cache(place, model, tokens, form, lambda _note: None)
                else:
                    continue
                caches.append(cache)
                break
            return str(place), caches[0].next_sequence

        place, first = parallel.from_first(next_sequence)
        folder = Path(place)
        if first < tokens.sequences or stores:
            starts = [0, *tokens.loss_mask.sum(dim=1).cumsum(0).tolist()]

            def seen(logits: Tensor, window: int) -> list[Tensor]:
                found = observe(logits if window >= first else logits[:0], form, starts[window])
                return [torch.from_numpy(each) for each in (found.counts, found.ids, found.values)]

            walked = slice(0 if stores else first, tokens.sequences)
            kept = self._kept_of(model, tokens, walked, seen if first < tokens.sequences else None, stores)
            pieces = (Observed(*(tensor.numpy() for tensor in piece)) for piece in kept if piece)
            if parallel.is_first() and not caches[0].complete:
                caches[0].write(pieces)
            for _ in pieces:  # of the others, and where there is nothing to write
                pass
            parallel.barrier()
        cache = caches[0] if caches else self._open_cache(folder, model, tokens, form, lambda _note: None)
        student.outputs = cache.records()
        self.bytes_per_token = round(cache.nbytes / max(1, tokens.predicted_tokens), 2)

    def _whole_outputs(self, tokens: PackedTokens, items: list[int], stores: Sequence[KeptStore]) -> Tensor:
        """Return the outputs [n, L] of a head with few of them, from the cache or the original; fill the stores too.

        `items` is how many of them each sequence has.
        """
        identity, folder = self._identity(tokens), self._config.teacher_cache
        file = folder / _outputs_name(identity) if folder is not None else None
        rows = stored_rows(file, identity, items, self._session.ui.note) if file is not None else None
        if rows is not None and not stores:
            return rows
        model = self._teacher.stream(self._teacher.checkpoint)
        reduce = (lambda outputs, _window: [outputs]) if rows is None else None
        found = [*self._kept_of(model, tokens, slice(0, tokens.sequences), reduce, stores)]
        return rows if rows is not None else captured_rows((piece for (piece,) in found), file, identity)

    def _kept_of(
        self,
        model: StreamedModel,
        tokens: PackedTokens,
        windows: slice,
        reduce: Reduce | None,
        stores: Sequence[KeptStore],
    ) -> Iterator[list[Tensor]]:
        """Yield what is kept of the original's outputs for these windows, and fill the stores."""
        with self._session.ui.progress("asking the original", tokens.sequences) as advance:
            for count, kept in asked(model, tokens, self._session.settings, windows, reduce, stores):
                yield kept
                for _ in range(count):
                    advance()

    def _cache_folder(self, tokens: PackedTokens, temperature: float) -> Path:
        """Return the folder of the cache of the original's outputs: the user's, found by content, or a scratch one."""
        if self._config.teacher_cache is None:
            return self._session.new_scratch("teacher")
        return self._config.teacher_cache / _records_name(self._identity(tokens), temperature)

    def _alone_in(self, folder: Path) -> bool:
        """Lock a folder that is written to until all is done; return whether no other run has locked it."""
        try:
            self._kept.enter_context(locked(folder))
        except LockedError:
            self._session.ui.note(
                f"another run is writing what the original says of the same data to {folder}; this one does not wait "
                "for it, and keeps its own for itself"
            )
            return False
        except OSError as error:
            raise LayerSurgeryError(
                f"--teacher-cache {self._config.teacher_cache} cannot be written ({why(error)}); give another one, or "
                "leave it out."
            ) from error
        return True

    def _open_cache(
        self,
        folder: Path,
        model: StreamedModel,
        tokens: PackedTokens,
        form: RecordForm,
        note: Callable[[str], None],
    ) -> TeacherCache:
        return TeacherCache.open(
            folder,
            self._identity(tokens),
            tokens=tokens.loss_mask.sum(dim=1).tolist(),
            vocabulary=model.vocabulary_size,
            form=form,
            note=note,
        )

    def _identity(self, tokens: PackedTokens) -> TeacherIdentity:
        """Return what the original's outputs are of."""
        return _identity_of(self._session, self._teacher_sha256, tokens)

    def _states(self, tokens: PackedTokens, layers: list[int]) -> TeacherStatesStore:
        """Return room for hidden states of the original after some layers."""
        hidden = int(self._teacher.checkpoint.config.hidden_size)
        return TeacherStatesStore(self._room(tokens, hidden, len(layers), torch.bfloat16), layers)

    def _relations(self, tokens: PackedTokens, dtype: torch.dtype) -> TeacherAttentionStore:
        """Return room for queries, keys and values of the original's last layer.

        In the dtype of computation: a softmax is of their products, where rounding to bfloat16 would be seen.
        """
        teacher = self._teacher.checkpoint
        place = last_attention(teacher)
        return TeacherAttentionStore(self._room(tokens, sum(place.widths), 1, dtype), place, teacher.layer_count - 1)

    def _room(self, tokens: PackedTokens, width: int, slots: int, dtype: torch.dtype) -> BoundaryStore:
        """Return room for so many slots [windows, S, width]. Refuses what does not fit on the disk."""
        shape = (tokens.sequences, tokens.sequence_length, width)
        memory = self._session.boundary_bytes // 4
        needed = slots * math.prod(shape) * dtype.itemsize
        free = shutil.disk_usage(self._session.scratch).free
        if needed - memory > free:
            names = ", ".join(loss.name for loss in self._losses)
            raise LayerSurgeryError(
                f"--loss {names} keeps states of the original, {needed:,} bytes, but {self._session.scratch.parent} "
                f"has {free:,} free; lower --tokens or --minutes, or take losses over logits."
            )
        store = BoundaryStore(shape, dtype, self._session.device, memory, self._session.scratch)
        return self._kept.enter_context(store)


def known_windows(
    session: Session, config: HealingConfig, prepared: PreparedHealing, teacher_sha256: str, tokens: PackedTokens
) -> int:
    """Return of how many windows, from the first on, `--teacher-cache` says that it has the original's outputs.

    Looks at names and headers only: whether the files are whole is seen when they are opened.
    """
    if config.teacher_cache is None:
        return 0
    identity, temperature = _identity_of(session, teacher_sha256, tokens), prepared.kept_temperature
    if (config.teacher_cache / _outputs_name(identity)).exists():
        return tokens.sequences
    return 0 if temperature is None else captured(config.teacher_cache / _records_name(identity, temperature))


def _identity_of(session: Session, teacher_sha256: str, tokens: PackedTokens) -> TeacherIdentity:
    tokenizer = session.need_tokenizer()
    template = str(tokenizer.chat_template or "")
    return TeacherIdentity(
        teacher_sha256=teacher_sha256,
        tokenizer_sha256=_sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True)),
        data_sha256=tokens.sha256,
        chat_template_sha256=_sha256(template) if template else "",
    )


def _records_name(identity: TeacherIdentity, temperature: float) -> str:
    described = {"identity": asdict(identity), "form": RecordForm(temperature=temperature).to_dict()}
    return _sha256(json.dumps(described, sort_keys=True))[:24]


def _outputs_name(identity: TeacherIdentity) -> str:
    return f"outputs-{_sha256(json.dumps(asdict(identity), sort_keys=True))[:24]}.safetensors"


def _remove_dead_lock(folder: Path) -> None:
    """Remove the lock that a run which was killed has left on a complete cache; one of a living run stays."""
    if lock_file(folder).exists():
        with suppress(LockedError, OSError), locked(folder):
            pass


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
