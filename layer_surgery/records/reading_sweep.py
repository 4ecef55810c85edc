"""Read a `sweep.json` back."""

from __future__ import annotations

from pathlib import Path

from layer_surgery.errors import ReportError
from layer_surgery.records.reading import read_json, validated
from layer_surgery.records.sweep import EVALUATION_DATA, SCHEMA_VERSION, SweepReport

SWEEP_FILE = "sweep.json"


def read_sweep(directory: Path, advice: str) -> SweepReport | None:
    """Return the sweep in a directory; None if there is none.

    Raises `ReportError` if it cannot be read, is of a newer schema, lacks something or contradicts itself; the message
    ends with the advice.
    """
    file = directory / SWEEP_FILE
    if not file.exists():
        return None
    report = validated(SweepReport, read_json(file, SCHEMA_VERSION, advice), file, advice)
    if not all(isinstance(text.get("name"), str) for text in report.evaluation):
        raise ReportError(f"{file} is damaged: evaluation has a text without a name; {advice}.")
    if len(report.evaluation) != len(report.identity.get(EVALUATION_DATA, [])):
        raise ReportError(f"{file} is damaged: evaluation and identity.{EVALUATION_DATA} differ in length; {advice}.")
    if not isinstance(report.base_model.get("name"), str):
        raise ReportError(f"{file} is damaged: base_model has no name; {advice}.")
    return report
