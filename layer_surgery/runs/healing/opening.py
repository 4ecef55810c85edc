"""What a healing of a saved result begins with: everything that can be refused is refused here, before any work."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import attrs

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.embedder import MODULES_FILE
from layer_surgery.checkpoint.heads import EMBEDDING
from layer_surgery.checkpoint.hub import local_directory
from layer_surgery.checkpoint.save import check_free_space
from layer_surgery.config import HealConfig
from layer_surgery.data.bundled import bundled_tasks
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError, ReportError
from layer_surgery.evaluation.task_names import check_task_names
from layer_surgery.healing.attention_maps import compared_layers
from layer_surgery.healing.relations import check_relations
from layer_surgery.healing.trainable import numbers_of, trained_names
from layer_surgery.progress import Ui
from layer_surgery.records import SurgeryReport
from layer_surgery.records.reading import REPORT_FILE, read_report
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.healing.beside import check_fits, model_bytes, training_bytes
from layer_surgery.runs.healing.prepare import PreparedHealing, prepare_healing
from layer_surgery.runs.healing.teachers import open_teachers
from layer_surgery.runs.output import open_output
from layer_surgery.runs.provenance import checkpoint_hash
from layer_surgery.runs.session import Model, Session, check_sources, open_session


@dataclass(frozen=True, kw_only=True)
class OpenedHealing:
    """A saved result, its original, the data, and what there is to measure."""

    session: Session  #: Of the result.
    teacher: Session  #: Of the original.
    teacher_sha256: str
    surgery: SurgeryReport  #: The record of the surgery that gave the result.
    staging: Path | None  #: Where the healed result is written before it is put in place; None if nothing is.
    healing: PreparedHealing
    names: set[str]  #: The parameters that are trained.
    evaluator: Evaluator

    @property
    def student(self) -> Checkpoint:
        """The result."""
        return self.session.checkpoint

    @property
    def texts(self) -> list[PackedTokens]:
        """For perplexity and distance."""
        return self.evaluator.texts


def open_healing(result: str | Path, config: HealConfig, stack: ExitStack) -> OpenedHealing:
    """Open the output, the result, its original, the data, and what there is to measure, until `stack` is left."""
    check_sources(config.text_column, calibration=config.data, evaluation=config.eval_data, option="--data")
    check_task_names(config, bundled_tasks)
    surgery = _surgery_of(result)
    staging = open_output(result, config, stack)
    session = stack.enter_context(open_session(result, config, staging.parent if staging else None))
    student = session.checkpoint
    _check_plan_fits(session, surgery, result)
    named = open_teachers(
        config.teacher,
        session,
        str(surgery.base_model.get("sha256")),
        lambda model: _opening(model, student, config),
        stack,
    )
    original = _teacher_of(result, surgery, named.original)
    opened = stack.enter_context(open_session(original, _opening(original, student, config), session.scratch))
    teacher = replace(opened, ui=session.ui)
    _check_same_vocabulary(session, teacher)
    if staging is not None:
        parallel.from_first(lambda: check_free_space(staging, student.size_bytes))
    healing = prepare_healing(
        session,
        config,
        config,
        fewer_dimensions=_dimensions(student) != _dimensions(teacher.checkpoint),
        teacher=teacher.checkpoint,
        teachers=named.teachers,
    )
    check_relations(healing.losses, teacher.checkpoint)
    if any(loss.entry.needs == "attention" for loss in healing.losses):
        compared_layers(student, teacher.checkpoint, surgery.plan.surviving)
    names = trained_names(student, surgery.plan, config.train)
    if config.both_models:
        needed = training_bytes(student, session, numbers_of(student, names))
        check_fits(session, model_bytes(teacher.checkpoint, session), needed)
    texts = session.evaluation_tokens(config)
    evaluator = stack.enter_context(Evaluator(session, config, texts, baseline=teacher))
    teacher.stream(teacher.checkpoint)  # proves, before anything else is done, that both can be walked over
    session.stream(student)
    return OpenedHealing(
        session=session,
        teacher=teacher,
        teacher_sha256=_check_made_of(teacher, surgery, result),
        surgery=surgery,
        staging=staging,
        healing=healing,
        names=names,
        evaluator=evaluator,
    )


def _surgery_of(result: str | Path) -> SurgeryReport:
    """Return the record of the surgery that gave a result."""
    directory = Path(result).expanduser()
    if not (directory / REPORT_FILE).is_file():
        raise ReportError(
            f"{result} has no {REPORT_FILE}, which says what it was made of and how; give a directory that "
            "`layer-surgery compress` has written."
        )
    return read_report(directory / REPORT_FILE)


def _check_plan_fits(session: Session, surgery: SurgeryReport, result: str | Path) -> None:
    count = session.checkpoint.layer_count
    if count != len(surgery.plan.surviving):
        raise ReportError(
            f"{result} has {count} layers, but its {REPORT_FILE} speaks of {len(surgery.plan.surviving)}; heal a "
            "directory as `layer-surgery compress` has written it."
        )


def _teacher_of(result: str | Path, surgery: SurgeryReport, given: Any) -> Model:
    """Return the original: as the user says, else where it was when the result was made."""
    if given is not None:
        model: Model = given
        return model
    name = str(surgery.base_model["name"])
    places = [Path(name).expanduser(), Path(result).expanduser().parent / name]
    for place in places:
        if any((place / name).is_file() for name in ("config.json", MODULES_FILE)):
            return place
    raise CheckpointError(f"the original of {result} was '{name}', which is not there any more; give --teacher MODEL.")


def _opening(original: Model, student: Checkpoint, config: HealConfig) -> HealConfig:
    """Return the options that the original is opened with: as an embedding model, if the result is one, though its own
    files may not say that it is."""
    config = attrs.evolve(config, ui=Ui())
    if student.embedder is None:
        return config
    if isinstance(original, str | Path) and (local_directory(str(original), None) / MODULES_FILE).is_file():
        return config
    return attrs.evolve(config, head=EMBEDDING.kind, pooling=student.embedder.pooling[0])


def _dimensions(checkpoint: Checkpoint) -> int | None:
    """Return the numbers in an embedding; None for a model that gives none."""
    return checkpoint.embedder.dimensions(checkpoint.hidden_size) if checkpoint.embedder is not None else None


def _check_same_vocabulary(session: Session, teacher: Session) -> None:
    """Refuse a teacher whose tokens are others, before any model is loaded."""
    ours, theirs = session.checkpoint, teacher.checkpoint
    if ours.vocabulary_size != theirs.vocabulary_size:
        raise CheckpointError(
            f"the teacher {theirs.name} has a vocabulary of {theirs.vocabulary_size} and {ours.name} one of "
            f"{ours.vocabulary_size}, so one cannot follow the other; give the model that it was made of."
        )
    if session.tokenizer is None or teacher.tokenizer is None:
        return
    if session.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise CheckpointError(
            f"the tokenizers of {ours.name} and of the teacher {theirs.name} have different vocabularies; give the "
            "model that it was made of."
        )
    if session.tokenizer.chat_template != teacher.tokenizer.chat_template:
        raise CheckpointError(
            f"{ours.name} and the teacher {theirs.name} have different chat templates, so they would read chats "
            "differently; copy the teacher's to the result, or the other way round."
        )


def _check_made_of(teacher: Session, surgery: SurgeryReport, result: str | Path) -> str:
    """Refuse a teacher that the result was not made of; return its hash."""
    expected, found = str(surgery.base_model.get("sha256")), checkpoint_hash(teacher)
    if found != expected:
        raise CheckpointError(
            f"{result} was not made of the teacher {teacher.checkpoint.name}: the SHA-256 of its original begins "
            f"{expected[:12]}, and that of the teacher {found[:12]}; give --teacher the model that it was made of."
        )
    return found
