"""Healing of a saved result: its original is found, asked once, and followed; then as after a compression."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from layer_surgery.config import HealConfig
from layer_surgery.records import SurgeryReport
from layer_surgery.runs.healing import heal
from layer_surgery.runs.healing.opening import open_healing
from layer_surgery.runs.outcome import evaluate_result, measured
from layer_surgery.runs.output import check_output_given, save_result, write_report
from layer_surgery.runs.provenance import run_provenance
from layer_surgery.runs.stages import stages_of_healing


def run_heal(result: str | Path, config: HealConfig) -> SurgeryReport:
    """Heal a saved result. Everything that can be refused is refused before any work is done."""
    check_output_given(config)
    with ExitStack() as stack:
        opened = open_healing(result, config, stack)
        session, student, staging, evaluator = opened.session, opened.student, opened.staging, opened.evaluator
        # Evaluate the original and the result.
        session.ui.plan(stages_of_healing(opened.texts, saved=staging is not None))
        with session.stage("evaluate_before"):
            evaluator.measure("before", opened.teacher.checkpoint)
        with session.stage("evaluate_unhealed"):
            evaluator.measure("unhealed", student)
        # Heal.
        healed = heal(
            opened.healing,
            session=session,
            teacher=opened.teacher,
            teacher_sha256=opened.teacher_sha256,
            student=student,
            plan=opened.surgery.plan,
        )
        # Evaluate what came of it, and save it.
        compared = evaluate_result(session, evaluator, healed.checkpoint, healed=True)
        files = save_result(session, healed.checkpoint, staging, student, config) if staging is not None else {}
        report = replace(
            opened.surgery,
            provenance=run_provenance(session, config) | {"surgery": opened.surgery.provenance},
            files=files,
            healing=healed.record,
            output=str(config.output) if staging is not None else None,
            **compared,
            **measured(session, evaluator),
        )
        return report if staging is None else write_report(report, staging, config)
