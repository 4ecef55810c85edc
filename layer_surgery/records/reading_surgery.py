"""Read a `surgery.json` back, of this release or an older one. What is damaged is refused with one sentence."""

from __future__ import annotations

from pathlib import Path

from layer_surgery.errors import ReportError
from layer_surgery.records import REPORT_SCHEMA_VERSION, SurgeryPlan, SurgeryReport
from layer_surgery.records.reading import read_json, validated

REPORT_FILE = "surgery.json"
ADVICE = "make it again with compress"


def report_file(path: Path) -> Path:
    """Return the `surgery.json` that a user means by a directory or the file itself. Raises `ReportError`."""
    if path.is_dir():
        file = path / REPORT_FILE
        if not file.is_file():
            raise ReportError(
                f"{path} has no {REPORT_FILE}, so it is not a result of Layer Surgery; give a directory that "
                "`layer-surgery compress` has written."
            )
        return file
    if not path.exists():
        raise ReportError(f"there is no directory '{path}'; give one that `layer-surgery compress` has written.")
    return path


def read_report(file: Path) -> SurgeryReport:
    """Return the report in a `surgery.json`.

    Raises `ReportError` if it cannot be read, is of a newer schema, lacks something or contradicts itself.
    """
    data = read_json(file, REPORT_SCHEMA_VERSION, ADVICE)
    if not isinstance(data.get("plan"), dict) or "base_model" not in data:
        raise ReportError(
            f"{file} is not the report of a compression (it has no plan and base_model); give the {REPORT_FILE} of a "
            "directory that `layer-surgery compress` has written."
        )
    if "dense_export" in data:
        raise ReportError(
            f"{file} belongs to a dense export; the page is that of the result it was made from, "
            f"{data['dense_export'].get('source') if isinstance(data['dense_export'], dict) else 'which see'}."
        )
    SurgeryPlan.from_dict(data["plan"], str(file))
    report = validated(SurgeryReport, {**data, "output": None}, file, ADVICE)
    _check(report, file)
    return report


def _layers_named(report: SurgeryReport) -> list[int]:
    return [spectrum.layer for spectrum in report.spectra] + [record.layer for record in report.refit]


def _check(report: SurgeryReport, file: Path) -> None:
    """Refuse what no type shows: parts of the report that contradict each other."""
    count = len(report.plan.layers)
    problem = ""
    if not isinstance(report.base_model.get("name"), str):
        problem = "base_model has no name"
    elif report.scores is not None and len(report.scores.values) != count:
        problem = f"it has {len(report.scores.values)} scores for {count} layers"
    elif any(not 0 <= layer < count for layer in _layers_named(report)):
        problem = f"it speaks of a layer beyond the {count} of its plan"
    elif report.scores is not None and any(not 0 <= index < count for index in report.scores.removal_order):
        problem = f"its removal_order names a layer beyond the {count} of its plan"
    elif any(
        len(s.components) != len(s.values) or len(s.kept) not in (0, len(s.values)) or not s.values
        for s in report.spectra
    ):
        problem = "a spectrum has lists of different lengths"
    if problem:
        raise ReportError(f"{file} is damaged: {problem}; make it again with compress.")
