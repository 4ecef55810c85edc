"""The original in memory beside the student (`--both-models`): whether it fits, and what of it the losses look at."""

from __future__ import annotations

from collections.abc import Sequence

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.config import HealingConfig
from layer_surgery.errors import UserError
from layer_surgery.healing.attention_maps import AttentionMaps
from layer_surgery.healing.losses.registry import Needs
from layer_surgery.healing.mixture import WeightedLoss
from layer_surgery.healing.relations import Relations, last_attention
from layer_surgery.healing.resident import ResidentOutputs, ResidentProjections, ResidentStates, ResidentTeacher
from layer_surgery.healing.stones import SteppingStones
from layer_surgery.healing.student import Student
from layer_surgery.healing.trainable import changed_positions
from layer_surgery.records import SurgeryPlan
from layer_surgery.runs.session import Session
from layer_surgery.walk.streamed import StreamedModel

#: What losses look at that only an original in memory gives.
ONLY_BESIDE: tuple[Needs, ...] = ("attention", "stones")
#: What losses look at that is not the original's, or is asked of it once for each text anyway.
_NOT_BESIDE: tuple[Needs, ...] = ("labels", "vectors")
#: Bytes of a number that is trained: itself, its gradient, and the two moments of the optimiser, in float32.
_TRAINED_BYTES = 16


def check_beside(
    losses: Sequence[WeightedLoss], config: HealingConfig, session: Session, original: Checkpoint, parameters: int
) -> None:
    """Raise `UserError` for losses that need both models where only one is to be in memory, and the other way round,
    and for models that surely do not fit together.

    Args:
        session: whose device and limit of memory count.
        parameters: of the student.
    """
    needed = model_bytes(original, session)
    only = next((loss.name for loss in losses if loss.entry.needs in ONLY_BESIDE), None)
    if only is not None and not config.both_models:
        raise UserError(
            f"--loss {only} looks at original and student together; add --both-models, which keeps the original's "
            f"{needed:,} bytes in memory too, or take losses over logits, states or relations."
        )
    if not config.both_models:
        return
    if all(loss.entry.needs in _NOT_BESIDE for loss in losses):
        names = ", ".join(loss.name for loss in losses)
        raise UserError(
            f"--both-models has nothing to do: --loss {names} looks at nothing that the original does in a step; "
            "leave it out."
        )
    check_fits(session, needed, parameters * (_TRAINED_BYTES if config.train == "all" else session.dtype.itemsize))


def check_fits(session: Session, original: int, student: int) -> None:
    """Raise `UserError` if so many bytes of the original and of the student do not fit into memory together."""
    available = session.available_bytes()
    if available is not None and original + student > available:
        raise UserError(
            f"--both-models keeps the original ({original:,} bytes) beside the student ({student:,} bytes), but "
            f"{available:,} bytes are available; leave it out and take losses over logits, states or relations, train "
            "less (--train), or pass another --memory-limit, --dtype or --device."
        )


def model_bytes(checkpoint: Checkpoint, session: Session) -> int:
    """Return the bytes of a model's weights in the dtype of computation."""
    return checkpoint.parameters * session.dtype.itemsize


def training_bytes(student: Checkpoint, session: Session, trained: int) -> int:
    """Return the bytes of a student of which so many numbers are trained, without activations."""
    return (student.parameters - trained) * session.dtype.itemsize + trained * _TRAINED_BYTES


def put_beside(
    student: Student,
    session: Session,
    original: Checkpoint,
    losses: Sequence[WeightedLoss],
    pairs: Sequence[tuple[int, int]],
    plan: SurgeryPlan,
) -> None:
    """Load the original and have the student's losses look at it.

    Raises `UserError` if both do not fit, and `CheckpointError` if there are no attention maps to compare.
    """
    trained = sum(each.numel() for each in student.parameters() if each.requires_grad)
    needed = model_bytes(original, session)
    check_fits(session, needed, training_bytes(student.checkpoint, session, trained))
    needs = {loss.entry.needs for loss in losses}
    student.maps = AttentionMaps(student.checkpoint, original, plan.surviving) if "attention" in needs else None
    if student.maps is not None and student.maps.left_out:
        left_out = ", ".join(map(str, student.maps.left_out))
        session.ui.note(f"healing: --loss attention leaves out layers {left_out}, whose heads the surgery took")
    teacher = ResidentTeacher(
        StreamedModel(original, device=session.device, dtype=session.dtype, resident_bytes=0),
        [layer for _, layer in pairs] if "states" in needs else (),
        last_attention(original) if "relations" in needs else None,
        student.maps,
    )
    student.resident = teacher
    if needs & {"logits", "stones"}:
        student.outputs = ResidentOutputs(teacher)
    if "states" in needs:
        student.states = ResidentStates(teacher)
    if "relations" in needs:
        student.relations = Relations(student.checkpoint, ResidentProjections(teacher))
    stones = next((loss for loss in losses if loss.entry.needs == "stones"), None)
    if stones is not None:
        student.stones = SteppingStones(teacher, changed_positions(plan), pairs, int(stones.settings["blocks"]))
    session.ui.note(f"healing: the original stays in memory beside the student: {needed / 1e6:,.1f} MB more")
