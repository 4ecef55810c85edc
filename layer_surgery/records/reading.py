"""Records read back from `surgery.json` and `sweep.json`, of this release or an older one.

What is damaged is refused with one sentence.
"""

import errno
import functools
import math
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from layer_surgery.disk.reading import read_json as disk_json
from layer_surgery.disk.reading import why
from layer_surgery.errors import ReportError
from layer_surgery.records.plan import SurgeryPlan
from layer_surgery.records.surgery import REPORT_SCHEMA_VERSION, SurgeryReport
from layer_surgery.records.sweep import EVALUATION_DATA, SCHEMA_VERSION, SweepReport

REPORT_FILE = "surgery.json"
SWEEP_FILE = "sweep.json"
ADVICE = "make it again with compress"

T = TypeVar("T")
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


def _check(report: SurgeryReport, file: Path) -> None:
    """Refuse what no type shows: parts of the report that contradict each other."""
    count = len(report.plan.layers)
    layers = [spectrum.layer for spectrum in report.spectra] + [record.layer for record in report.refit]
    problem = ""
    if not isinstance(report.base_model.get("name"), str):
        problem = "base_model has no name"
    elif report.scores is not None and len(report.scores.values) != count:
        problem = f"it has {len(report.scores.values)} scores for {count} layers"
    elif any(not 0 <= layer < count for layer in layers):
        problem = f"it speaks of a layer beyond the {count} of its plan"
    elif report.scores is not None and any(not 0 <= index < count for index in report.scores.removal_order):
        problem = f"its removal_order names a layer beyond the {count} of its plan"
    elif any(
        len(s.components) != len(s.values) or len(s.kept) not in (0, len(s.values)) or not s.values
        for s in report.spectra
    ):
        problem = "a spectrum has lists of different lengths"
    if problem:
        raise ReportError(f"{file} is damaged: {problem}; {ADVICE}.")


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


def read_json(file: Path, schema_version: int, advice: str) -> dict[str, Any]:
    """Return the object in a file of at most this schema version. Raises `ReportError`, which ends with the advice."""
    try:
        data = disk_json(file, _MOST_BYTES, parse_constant=_refuse, parse_float=_finite)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ReportError(f"{file}: {why(error)}, so it is none of ours; {advice}.") from error
        raise ReportError(f"{file} cannot be read ({why(error)}).") from error
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ReportError(f"{file} is damaged: it is not JSON ({reason}); {advice}.") from error
    if not isinstance(data, dict):
        raise ReportError(f"{file} is damaged: it is not an object; {advice}.")
    version = data.get("schema_version")
    if type(version) is not int or version < 1:
        raise ReportError(f"{file} is damaged: its schema_version is {version!r}; {advice}.")
    if version > schema_version:
        raise ReportError(
            f"{file} has schema version {version}, and this release reads up to {schema_version}; take a newer "
            f"layer-surgery, or {advice}."
        )
    return data


def validated(cls: type[T], data: dict[str, Any], file: Path, advice: str) -> T:
    """Return the record `cls` made of what `read_json` gave. Raises `ReportError`, which names the first wrong place.

    A field that is not there has its default: an older release did not write it.
    """
    try:
        record: T = _adapter(cls).validate_python(data)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(f"{file} is damaged at '{where}': {first['msg'].lower()}; {advice}.") from error
    return record


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    """Return what checks a record; making it takes longer than using it."""
    return TypeAdapter(cls)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value
