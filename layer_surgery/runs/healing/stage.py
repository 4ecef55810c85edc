"""Healing as a stage of a run: the learning rate, local and global training, and what it gained."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.data.tokens import joined
from layer_surgery.healing.adapters import add_adapters
from layer_surgery.healing.local import GradientMoments, LayerStudent, Place
from layer_surgery.healing.packing import packed_batch_size, packs
from layer_surgery.healing.pairs import layer_pairs
from layer_surgery.healing.probe import (
    LEARNING_RATES,
    LIKELIEST,
    LIKELIEST_OF_LORA,
    MOST_RATES,
    PROBE_STEPS,
    Probe,
    probe,
)
from layer_surgery.healing.relations import check_relations
from layer_surgery.healing.student import Student
from layer_surgery.healing.trainable import changed_positions, numbers_of, trained_names
from layer_surgery.healing.training import Training, TrainingSettings, train
from layer_surgery.healing.windows import HealingData, training_order
from layer_surgery.records import CurvePoint, HealingRecord, LocalRecord, LossRecord, SurgeryPlan
from layer_surgery.runs.healing.asking import Asking
from layer_surgery.runs.healing.beside import put_beside
from layer_surgery.runs.healing.length import (
    LOCAL_SHARE,
    LOCAL_STEPS,
    LOCAL_WINDOWS,
    PROBE_SHARE,
    steps_in,
    steps_of_tokens,
    validations_of,
)
from layer_surgery.runs.healing.prepare import PreparedHealing
from layer_surgery.runs.healing.results import Results, write_trained
from layer_surgery.runs.healing.resuming import check_resumed, models_identity
from layer_surgery.runs.session import Session
from layer_surgery.walk.rehearsal import Rehearsal
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk

#: Texts that the map of a student's vectors into its teachers' space begins with the least squares of.
_PROJECTED_TEXTS = 4096


@dataclass(frozen=True, kw_only=True)
class Healed:
    """The result of a healing; its tensors are in scratch files of the session."""

    checkpoint: Checkpoint
    record: HealingRecord


def heal(
    prepared: PreparedHealing,
    *,
    session: Session,
    teacher: Session,
    teacher_sha256: str,
    student: Checkpoint,
    plan: SurgeryPlan,
) -> Healed:
    """Train a student to follow its teacher; the result is never worse on the text that was held out.

    Args:
        session: whose device, dtype, scratch files and clock are used.
        teacher: session of the original.
        teacher_sha256: hash of the original.
        student: what the surgery gave.
        plan: that the surgery followed.
    """
    check_relations(prepared.losses, student)
    return _Healing(prepared, session, teacher, teacher_sha256, student, plan).run()


class _Healing:
    """One healing, with what its steps share."""

    def __init__(
        self,
        prepared: PreparedHealing,
        session: Session,
        teacher: Session,
        teacher_sha256: str,
        checkpoint: Checkpoint,
        plan: SurgeryPlan,
    ) -> None:
        self._config, self._losses, self._data = prepared.config, prepared.losses, prepared.data
        self._prepared, self._session, self._checkpoint, self._plan = prepared, session, checkpoint, plan
        self._teacher, self._teacher_sha256 = teacher, teacher_sha256
        self._identity = self._known_identity(teacher_sha256)
        self._pairs = layer_pairs(plan.surviving, len(plan.layers))
        self._start = time.monotonic()
        self._kept = ExitStack()
        self._asking = Asking(session, teacher, teacher_sha256, prepared, self._pairs, self._kept)
        self._results = Results(session, checkpoint.name)
        self._seconds_a_window = 0.0  # that asking the original takes

    def run(self) -> Healed:
        config = self._config
        names = trained_names(self._checkpoint, self._plan, config.train)
        local: list[LocalRecord] = []
        probed, rate, count = None, None, numbers_of(self._checkpoint, names)
        training = Training(curve=[], best_step=None, steps=0)
        timed = self._session.clock.stage
        with self._session.stage("heal"), self._kept:
            checkpoint = self._checkpoint
            if self._data.train.objective.problem == "embedding":
                self._data = self._held_out_embedded()
            if config.teacher_rewrite:
                self._data = self._asking.rewritten(self._data)
            if "local" in config.stages:
                with timed("heal_local"):
                    checkpoint, local = self._local_stage(names)
            if "global" in config.stages:
                student = self._student(checkpoint)
                count = student.unfreeze(names)
                if config.both_models:
                    original = self._teacher.checkpoint
                    put_beside(student, self._session, original, self._losses, self._pairs, self._plan)
                if student.projects_vectors:
                    few = self._asking.embedded(self._data.first(_PROJECTED_TEXTS).train)
                    student.fit_projection(few, self._session.runtime.batch_size)
                student.packs = self._packs(student)
                with timed("heal_probe"):
                    probed = self._probe(student)
                steps = self._steps(probed)
                self._data = self._data.first(steps * config.step_sequences)
                with timed("heal_ask"):
                    self._data = self._asking.ask(student, self._data)
                rate = probed.best if probed is not None else config.learning_rate
                with timed("heal_train"):
                    training = self._train(student, steps, rate or LIKELIEST)
                    if training.best_step is not None:
                        healed = self._results.of_student(checkpoint, student)
                        checkpoint = self._results.better(checkpoint, healed, self._data)
        teachers = self._prepared.teachers
        record = HealingRecord(
            losses=[LossRecord(name=loss.name, weight=loss.weight, options=loss.settings) for loss in self._losses],
            train=config.train,
            trained_parameters=count,
            stages=list(config.stages),
            learning_rate=rate,
            steps=training.steps,
            step_sequences=config.step_sequences,
            tokens=training.curve[-1].tokens if training.curve else 0,
            data=self._prepared.described,
            held_out_windows=self._data.validation.sequences,
            general_windows=self._data.general_windows,
            curve=training.curve,
            best_step=training.best_step,
            helped=checkpoint is not self._checkpoint,
            probe=probed.points if probed is not None else [],
            local=local,
            stopped=training.stopped,
            teacher_bytes_per_token=self._asking.bytes_per_token,
            teachers=teachers.records(self._teacher, self._teacher_sha256) if teachers is not None else [],
        )
        return Healed(checkpoint=checkpoint, record=record)

    def _known_identity(self, teacher_sha256: str) -> dict[str, Any]:
        """Return what checkpoints are to say that the training is of; raises `UserError` if one to go on from differs.

        Nothing where no checkpoint is kept: hashing the student reads it once.
        """
        if self._config.checkpoints is None and self._config.resume is None:
            return {}
        identity = self._prepared.identity | models_identity(self._checkpoint, teacher_sha256)
        if self._config.resume is not None:
            check_resumed(self._config.resume, identity)
        return identity

    def _held_out_embedded(self) -> HealingData:
        """Return the data with the original's vectors of the texts that are not trained on."""
        watched = self._data.watched
        return replace(
            self._data,
            validation=self._asking.embedded(self._data.validation),
            watched=None if watched is None else self._asking.embedded(watched),
        )

    def _student(self, checkpoint: Checkpoint) -> Student:
        """Load a student whole, with adapters if these are trained."""
        device, dtype = self._session.device, self._session.dtype
        streamed = StreamedModel(checkpoint, device=device, dtype=dtype, resident_bytes=0)
        student = Student(streamed, self._losses, pairs=self._pairs)
        if self._config.train == "lora":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._session.runtime.seed)
                add_adapters(student.model, checkpoint.architecture.layers, self._config.lora_rank)
        return student

    def _packs(self, student: Student) -> bool:
        """Return whether short windows may share rows, which both models have to be exact with."""
        bodies = [student.body, *([student.resident.body] if student.resident is not None else [])]
        found = [packs(body, self._data.train) for body in bodies]
        if False in found:
            kind = self._checkpoint.architecture.model_type
            self._session.ui.note(
                f"healing: windows are padded and not packed, because this model ({kind}) is not exact with packed ones"
            )
        return all(found)

    # -- the local stage -------------------------------------------------------------------------------------------

    def _local_stage(self, names: set[str]) -> tuple[Checkpoint, list[LocalRecord]]:
        """Train the changed layers one by one; return the checkpoint, which is the given one if that gains nothing."""
        places = [
            Place(position, self._plan.surviving[position], self._pairs[position][1] + 1)
            for position in changed_positions(self._plan)
        ]
        windows = slice(0, min(LOCAL_WINDOWS, self._data.data_windows))
        train = self._data.train.select(windows)
        data = replace(
            self._data,
            train=self._asking.embedded(train) if train.objective.problem == "embedding" else train,
            order=torch.arange(windows.stop),
            data_windows=windows.stop,
            watched=None,
        )
        tokens = joined("local", [data.train, data.validation])
        student, folder = self._session.stream(self._checkpoint), self._session.new_scratch("local")
        records, calls = [], Rehearsal(student)
        teacher = self._teacher.stream(self._teacher.checkpoint)
        with Walk(teacher, tokens, self._session.settings) as walk:
            moments = GradientMoments(walk)
            if self._config.local_error == "fisher":
                walk.backpropagate([moments], watch={place.after - 1 for place in places})
            else:
                walk.forward(range(teacher.layer_count), keep=True)
            with self._session.ui.progress("healing layers", len(places)) as advance:
                for place in places:
                    with student.layer(place.position) as layer:
                        metric = moments.moments.get(place.after - 1)
                        one = LayerStudent(layer, place, walk, calls, metric, data.validation.sequences)
                        records.append(self._heal_layer(one, place, data, names, folder, len(places)))
                    advance()
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            return self._checkpoint, records
        healed = self._results.with_files(self._checkpoint, files)
        checkpoint = self._results.better(self._checkpoint, healed, self._data)
        if checkpoint is self._checkpoint:
            self._session.ui.note("healing: the local stage made the whole no better, so its layers are not used")
        return checkpoint, records

    def _heal_layer(
        self, one: LayerStudent, place: Place, data: HealingData, names: set[str], folder: Path, layers: int
    ) -> LocalRecord:
        """Train a layer, and write its tensors if that has lowered its error."""
        prefix = self._checkpoint.layer_prefix(place.position)
        one.unfreeze({name.removeprefix(prefix) for name in names if name.startswith(prefix)})
        before = one.measure("validation", data.validation, self._session.runtime.batch_size)
        settings = self._settings("layer", data, steps=LOCAL_STEPS, rate=LIKELIEST)
        if self._config.budget_minutes is not None:
            settings = replace(settings, seconds=max(1.0, LOCAL_SHARE * 60 * self._config.budget_minutes / layers))
        rate = self._config.learning_rate or probe(one, data, settings).best
        training = train(one, data, replace(settings, learning_rate=rate), unhealed={"validation": before})
        after = one.measure("validation", data.validation, self._session.runtime.batch_size)
        kept = training.best_step is not None
        if kept:
            specs = self._checkpoint.source.specs
            trained = {prefix + name: value for name, value in one.model.named_parameters() if value.requires_grad}
            write_trained(folder / f"{place.position:05d}.safetensors", trained, specs)
        _remove(settings.directory)
        self._session.ui.note(
            f"healing: layer {self._plan.surviving[place.position]}: {one.name} {before:.5f} to {after:.5f}"
        )
        return LocalRecord(
            layer=self._plan.surviving[place.position], metric=one.name, before=before, after=after, kept=kept
        )

    # -- how long, and how fast ------------------------------------------------------------------------------------

    def _probe(self, student: Student) -> Probe | None:
        """Try learning rates, unless one is given; a budget of minutes needs the time of a step all the same."""
        rate = self._config.learning_rate
        if rate is not None and self._config.budget_minutes is None:
            return None
        few = self._data.first(PROBE_STEPS * self._config.step_sequences)
        start = time.monotonic()
        few = self._asking.ask(student, few)
        self._seconds_a_window = (time.monotonic() - start) / few.train.sequences
        rates = LEARNING_RATES if rate is None else (rate,)
        settings = self._settings("probe", few, steps=PROBE_STEPS, rate=LIKELIEST, packs=student.packs)
        if self._config.budget_minutes is not None:
            settings = replace(settings, seconds=PROBE_SHARE * 60 * self._config.budget_minutes)
        with self._session.ui.progress("trying learning rates", min(len(rates), MOST_RATES) * PROBE_STEPS) as advance:
            likeliest = LIKELIEST_OF_LORA if self._config.train == "lora" else LIKELIEST
            found = probe(student, few, settings, rates, likeliest, advance)
        _remove(settings.directory)
        tried = ", ".join(
            f"{point.learning_rate:g}: " + ("not finite" if point.regret is None else f"{point.regret:+.4f}")
            for point in found.points
        )
        self._session.ui.note(
            f"healing: learning rate {found.best:g} (change of the loss after a few steps with {tried})"
        )
        return found

    def _steps(self, probed: Probe | None) -> int:
        """Return how many steps the budget allows."""
        config, data = self._config, self._data
        if config.tokens is not None:
            return steps_of_tokens(config, data)
        assert probed is not None and config.budget_minutes is not None
        left = 60 * config.budget_minutes - (time.monotonic() - self._start)
        asking, step = self._seconds_a_window, probed.seconds_per_step
        return int(parallel.from_first(lambda: steps_in(left, data, config, asking=asking, step=step)))

    # -- training --------------------------------------------------------------------------------------------------

    def _settings(
        self, name: str, data: HealingData, *, steps: int, rate: float, packs: bool = False
    ) -> TrainingSettings:
        config, session = self._config, self._session
        batch_size = session.runtime.batch_size
        if data.train.objective.problem == "embedding":  # texts are compared within a micro-batch: all of a step
            batch_size = max(batch_size, config.step_sequences)
        if packs:
            order = training_order(data, steps, config.step_sequences, session.runtime.seed)
            lengths, room = data.train.valid.sum(dim=1)[order], batch_size * data.train.sequence_length
            share = config.step_sequences // parallel.group().world
            batch_size = max(batch_size, packed_batch_size(lengths, share, room))
        return TrainingSettings(
            steps=steps,
            learning_rate=rate,
            step_sequences=config.step_sequences,
            batch_size=batch_size,
            seed=session.runtime.seed,
            directory=session.new_scratch(name),
            device=session.device,
            dtype=session.dtype,
            gradient_checkpointing=config.gradient_checkpointing,
            validations=validations_of(steps, self._data, config),
        )

    def _train(self, student: Student, steps: int, rate: float) -> Training:
        config, session = self._config, self._session
        settings = self._settings("training", self._data, steps=steps, rate=rate, packs=student.packs)
        if config.budget_minutes is not None:
            left = 60 * config.budget_minutes - (time.monotonic() - self._start)
            settings = replace(settings, seconds=max(1.0, left))
        keep = config.checkpoints
        settings = replace(
            settings,
            report_to=config.report_to,
            keep_state=keep is not None,
            identity=self._identity,
            directory=keep or settings.directory,
        )
        unhealed = {
            name: student.measure(name, text, session.runtime.batch_size) for name, text in self._data.texts.items()
        }
        with session.ui.progress("healing", steps) as advance:
            return train(
                student,
                self._data,
                settings,
                unhealed=unhealed,
                say=lambda point: session.ui.note(_described(point, steps, unhealed)),
                advance=advance,
                resume=config.resume,
            )


def _remove(folder: Path) -> None:
    """Remove what a training has written: of every layer and every learning rate it would take room until the end."""
    parallel.barrier()  # all have read it
    if parallel.is_first():
        shutil.rmtree(folder, ignore_errors=True)


def _described(point: CurvePoint, steps: int, unhealed: dict[str, float]) -> str:
    """Return a point of the curve as a line."""
    losses = [f"{name} {value:.4f}" for name, value in point.losses.items()]
    texts = [f"{name} {value:.4f} ({value - unhealed[name]:+.4f})" for name, value in point.validation.items()]
    return f"healing: step {point.step} of {steps}: " + ", ".join([*losses, *texts])
