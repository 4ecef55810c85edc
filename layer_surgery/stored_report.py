"""Read a `surgery.json` back, of this release or an older one. What is damaged is refused with one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from layer_surgery.errors import ReportError
from layer_surgery.records import REPORT_SCHEMA_VERSION, SurgeryPlan, SurgeryReport

REPORT_FILE = "surgery.json"
#: Larger files are none of ours: even with every layer of a very large model operated on it is a tenth of this.
_MOST_BYTES = 200_000_000


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
    data = _read_json(file)
    if not isinstance(data, dict) or not isinstance(data.get("plan"), dict) or "base_model" not in data:
        raise ReportError(
            f"{file} is not the report of a compression (it has no plan and base_model); give the {REPORT_FILE} of a "
            "directory that `layer-surgery compress` has written."
        )
    version = data.get("schema_version")
    if type(version) is not int or version < 1:
        raise ReportError(f"{file} is damaged: its schema_version is {version!r}; make it again with compress.")
    if version > REPORT_SCHEMA_VERSION:
        raise ReportError(
            f"{file} has schema version {version}, and this release reads up to {REPORT_SCHEMA_VERSION}; take a newer "
            "layer-surgery."
        )
    SurgeryPlan.from_dict(data["plan"], str(file))
    try:
        report = TypeAdapter(SurgeryReport).validate_python({**data, "output": None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(f"{file} is damaged at '{where}': {first['msg'].lower()}; make it again.") from error
    _check(report, file)
    return report


def _read_json(file: Path) -> Any:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ReportError(f"{file} has more than {_MOST_BYTES:,} bytes, so it is not a {REPORT_FILE}.")
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse, parse_float=_finite)
    except OSError as error:
        raise ReportError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ReportError(f"{file} is damaged: it is not JSON ({reason}); make it again with compress.") from error


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


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
