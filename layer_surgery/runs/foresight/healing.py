"""`heal --dry-run`: what a healing of a saved result will take, before any pass over the data."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import attrs

from layer_surgery import parallel
from layer_surgery.config import HealConfig
from layer_surgery.records.foresight import Foresight, StageForesight
from layer_surgery.runs.foresight import memory, seconds
from layer_surgery.runs.foresight.fits import too_much_memory
from layer_surgery.runs.foresight.healing_case import HealingCase
from layer_surgery.runs.foresight.healing_stages import ForeseenHealing
from layer_surgery.runs.foresight.process import Process, means
from layer_surgery.runs.foresight.sizes import sizes_of
from layer_surgery.runs.healing.asking import known_windows
from layer_surgery.runs.healing.opening import OpenedHealing, open_healing
from layer_surgery.runs.healing.resuming import check_resumed, models_identity

_ADVICE = "choose another disk for what can be elsewhere, train less (--train, --tokens or --minutes)"


def run_foresee_heal(result: str | Path, config: HealConfig) -> Foresight:
    """Say what a healing will take. Raises what the healing would refuse, and `UserError` if it cannot fit."""
    config = attrs.evolve(config, no_save=True)
    parallel.check_alone("--dry-run")
    with ExitStack() as stack:
        opened = open_healing(result, config, stack)
        if config.resume is not None:
            identity = opened.healing.identity | models_identity(opened.student, opened.teacher_sha256)
            check_resumed(config.resume, identity)
        return _foresee(opened, config)


def _foresee(opened: OpenedHealing, config: HealConfig) -> Foresight:
    session, teacher = opened.session, opened.teacher
    length = opened.healing.data.train.sequence_length
    teacher_sizes, student_sizes = (sizes_of(each, opened.texts, length=length) for each in (teacher, session))
    healing = ForeseenHealing.measure(
        opened.healing,
        session,
        teacher,
        opened.surgery.plan,
        (teacher_sizes, student_sizes),
        known=lambda tokens: known_windows(session, config, opened.healing, opened.teacher_sha256, tokens),
    )
    process, rates = Process.now(session), healing.rates

    def foreseen(case: HealingCase) -> list[StageForesight]:
        stages = [
            process.stage(
                "evaluate_before",
                "evaluating the original",
                seconds.evaluation(case.teacher, rates.teacher, compared=False),
                memory.evaluation(case.teacher, compared=False),
                case.teacher,
            )
        ]
        evaluated = seconds.evaluation(case.student, rates.student, compared=True)
        working = memory.evaluation(case.student, compared=True)
        title = "evaluating the model before healing"
        stages.append(process.stage("evaluate_unhealed", title, evaluated, working, case.student))
        stages += healing.stages(case, process)
        stages.append(process.stage("evaluate_after", "evaluating the result", evaluated, working, case.student))
        if config.output is not None:
            largest = max(layer.largest for layer in case.student.layers) * case.student.stored_itemsize
            read = sum(rates.student.reading.values())
            stages.append(process.stage("save", "saving", read, {"weights": largest}, case.student))
        return stages

    def check(found: Foresight, available: int | None) -> None:
        if available is not None and found.memory_bytes > available:
            raise too_much_memory(found, available, healing.that_fit(available, foreseen))

    files = healing.files()
    scratch = files.pop("") + memory.boundary_files_bytes(teacher_sizes)
    left_out = ["tasks, continuations and speed"] if config.tasks or config.continuations or config.speed else []
    return process.found(
        foreseen(healing.case),
        output=config.output,
        output_bytes=opened.student.size_bytes if config.output is not None else 0,
        scratch_bytes=scratch,
        kept=healing.kept(files),
        probed=means(rates.student) | {"asked": rates.asked, "optimiser": rates.optimiser},
        left_out=left_out + healing.left_out,
        check_memory=check,
        advice=_ADVICE,
    )
