"""Memory and files of healing, from sizes and from what a layer of the student was seen to keep for its gradients."""

from __future__ import annotations

from collections.abc import Mapping

from layer_surgery.runs.foresight.healing_case import HealingCase
from layer_surgery.runs.foresight.memory import Parts
from layer_surgery.runs.healing.length import LOCAL_WINDOWS
from layer_surgery.walk.walk import LOGITS_AT_A_TIME

#: Bytes of a number that is trained: itself; with its gradient; and with the two moments of the optimiser, in float32.
_WEIGHT, _WITH_GRADIENT, _TRAINED = 4, 8, 16
#: Logits of a chunk with what the losses make of them on the way forward and back, in float32.
_LOGITS_BACK = 5
#: Logits of a whole window, their log-probabilities, and those that are kept, in float64.
_LOGITS_KEPT = 3


def local(case: HealingCase, activations: Mapping[int, float]) -> Parts:
    """Return the memory of the local stage: one layer of each model, and the states at the boundaries that it keeps."""
    teacher, student, data = case.teacher, case.student, case.prepared.data
    windows = min(LOCAL_WINDOWS, data.data_windows) + data.validation.sequences
    fisher = case.config.local_error == "fisher"
    slots = len(teacher.layers) + 1 + (2 if fisher else 0)
    itemsize, width = student.dtype.itemsize, 4
    layers = [student.layers[index].parameters for index in case.positions]
    working = max((activations.get(index, 0.0) for index in case.positions), default=0.0)
    return {
        "weights": teacher.layer_bytes + teacher.outside * itemsize + student.outside * itemsize,
        "what is trained": max(layers, default=0) * (_TRAINED + _WEIGHT),
        "hidden states": teacher.boundaries(slots, windows, case.length)[0],
        "gradients' moments": len(case.positions) * teacher.hidden**2 * width if fisher else 0,
        "kept for gradients": int(working * case.micro_batch * case.length),
    }


def asking(case: HealingCase) -> Parts:
    """Return the memory of asking the original while the student waits."""
    teacher, length = case.teacher, case.length
    window = max(1, length * teacher.hidden * teacher.dtype.itemsize)
    windows = case.prepared.data.train.sequences
    together = min(windows, max(teacher.batch_size, teacher.boundary_bytes // (2 * window)))
    logits = _LOGITS_KEPT * length * teacher.vocabulary * 4 if "logits" in case.needs else 0
    return {
        "the student": _student(case, _WEIGHT),
        "weights of the original": teacher.layer_bytes + teacher.outside * teacher.dtype.itemsize,
        "hidden states": teacher.boundaries(2, together, length)[0] + _states(case, windows)[0],
        "logits": logits,
    }


def training(case: HealingCase, activations: Mapping[int, float], *, windows: int) -> Parts:
    """Return the memory of steps of the optimiser, or of writing a checkpoint between two of them."""
    student, teacher, tokens = case.student, case.teacher, case.micro_batch * case.length
    state = tokens * student.hidden * student.dtype.itemsize
    if case.checkpointing:
        largest = max(activations.values(), default=0.0) * tokens
        kept = (len(student.layers) * state + largest) if largest else 0.0
    else:
        kept = sum(activations.values()) * tokens
    logits = min(tokens * student.vocabulary, LOGITS_AT_A_TIME) * 4 * _LOGITS_BACK
    original = 0
    if case.both_models:
        original = case.teacher_parameters * teacher.dtype.itemsize
    elif case.slots and "logits" in case.needs:  # its head makes logits again
        original = teacher.outside * teacher.dtype.itemsize
    step = {
        "kept for gradients": int(kept),
        "logits and gradients": 4 * state + logits + 2 * case.trained.outside * _WEIGHT,
    }
    written = {"a checkpoint that is written": case.trained.all * _WEIGHT}  # as bytes, made of what is trained
    lasting = {
        "the student": _student(case, _TRAINED),
        "the original": original,
        "states of the original": _states(case, windows)[0],
    }
    return lasting | max(step, written, key=lambda parts: sum(parts.values()))


def answering(case: HealingCase) -> Parts:
    """Return the memory of the original as it answers prompts, whole in memory, with what it has read."""
    teacher = case.teacher
    read = len(teacher.layers) * 2 * case.length * teacher.hidden * teacher.dtype.itemsize
    return {"the original": case.teacher_parameters * teacher.dtype.itemsize, "keys and values": read}


def files(case: HealingCase, *, windows: int, bytes_per_token: float, validations: int) -> dict[str, int]:
    """Return the bytes of the files of a healing, by the option that says where they are; "" is a scratch folder."""
    config, tokens = case.config, windows * case.length
    found = {"": 0}
    records = 0
    if case.keeps_records:
        records = int(bytes_per_token * tokens)
    elif case.one_answer and config.teacher_cache is not None:
        records = windows * case.teacher.hidden * 4
    where = "--teacher-cache" if config.teacher_cache is not None else ""
    found[where] = found.get(where, 0) + records
    found[""] += _states(case, windows)[1]
    if "global" in config.stages:
        weights = case.trained.all * _WEIGHT
        where = "--checkpoints" if config.checkpoints is not None else ""
        # What it began with, the best and the last one, and one that is being written; or all, with the optimiser's.
        written = weights + validations * 3 * weights if where else 4 * weights
        found[where] = found.get(where, 0) + written
        found[""] += case.trained.all * case.student.stored_itemsize
    if "local" in config.stages:
        data, slots = case.prepared.data, len(case.teacher.layers) + 1
        held = min(LOCAL_WINDOWS, data.data_windows) + data.validation.sequences
        layers = [case.student.layers[index].parameters for index in case.positions]
        found[""] += case.teacher.boundaries(slots, held, case.length)[1]
        found[""] += sum(layers) * case.student.stored_itemsize + 4 * max(layers, default=0) * _WEIGHT
    return found


def _student(case: HealingCase, trained: int) -> int:
    """Return the bytes of a student whose trained numbers take so many each."""
    itemsize = case.student.dtype.itemsize
    rounded = case.trained.all * itemsize if itemsize < _WEIGHT else 0  # copies that products are formed of
    frozen = case.student_parameters - (case.trained.all - case.trained.added)
    return max(0, frozen) * itemsize + case.trained.all * trained + rounded


def _states(case: HealingCase, windows: int) -> tuple[int, int]:
    """Return the bytes in memory and on disk of states of the original that losses look at."""
    width = 2 * case.slots * case.teacher.hidden
    if "relations" in case.needs and not case.both_models:
        width += case.related * case.teacher.dtype.itemsize
    found = windows * case.length * width
    held = min(found, case.teacher.boundary_bytes // 4)
    return held, found - held
