"""Writes the page and the card of results, new or stored ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layer_surgery.checkpoint.modeling_layer_surgery import MODEL_TYPE
from layer_surgery.checkpoint.origin import is_valid_hub_id
from layer_surgery.checkpoint.save import PAGE_FILES, write_atomically
from layer_surgery.errors import LayerSurgeryError, OutputError, ReportError, UserError
from layer_surgery.records import SurgeryReport
from layer_surgery.records.reading import read_report, read_sweep, report_file
from layer_surgery.records.sweep import SweepReport

if TYPE_CHECKING:
    from layer_surgery.reporting.compare import ResultRow

PAGE_FILE, CARD_FILE = PAGE_FILES
SWEEP_ADVICE = "make it again with sweep"


def write_page_and_card(directory: Path, report: SurgeryReport, name: str) -> None:
    """Write `report.html` and `README.md` of a new result into its directory.

    Args:
        name: what the result is called: the directory may still have another name.
    """
    needs_code = _needs_code(directory, report)
    write_atomically(directory / PAGE_FILE, _page(report, name, needs_code))
    write_atomically(directory / CARD_FILE, _card(report, name, needs_code))


def report_on(
    results: Sequence[Path], output: Path | None, *, base_model: str | None = None, overwrite: bool = False
) -> tuple[Path, list[str]]:
    """Make the page of one stored result again (and its card), or one page that compares several.

    Args:
        results: directories that `compress` or `sweep` has written, or the `surgery.json` of a result.
        output: file of the page; None is `report.html` in the directory of the only result, whose card is then made
            again too, unless somebody has edited it.
        base_model: name of the original on the hub, for the card.
        overwrite: whether `output`, or an edited card, is replaced.

    Returns: where the page is, and notes for the user.
    Raises: `UserError` for what is no report, or may not be written, before anything is.
    """
    _check(results, output, base_model, overwrite)
    if len(results) > 1 and output is not None:
        with _consistent("a report"):
            text = _compared(results)
        _write(output, text)
        return output, []
    sweep = read_sweep(results[0], SWEEP_ADVICE)
    if sweep is None:
        return _report_on_one(results[0], output, base_model, overwrite)
    if base_model is not None:
        raise UserError(f"--base-model is for the card of a result, and {results[0]} holds a sweep; leave it out.")
    page = output or results[0] / PAGE_FILE
    with _consistent(f"the sweep of {results[0]}"):
        text = _sweep_page(sweep)
    _write(page, text)
    return page, []


def _report_on_one(path: Path, output: Path | None, base_model: str | None, overwrite: bool) -> tuple[Path, list[str]]:
    """Write the page of a result to `output`, or page and card into its directory."""
    name, report = _name(path), read_report(report_file(path))
    if base_model is not None:
        report = replace(report, base_model=report.base_model | {"hub_id": base_model})
    needs_code = _needs_code(path if path.is_dir() else path.parent, report)
    with _consistent(f"the report of {path}"):
        page, card = _page(report, name, needs_code), _card(report, name, needs_code)
    if output is not None:
        _write(output, page)
        return output, []
    _write(path / PAGE_FILE, page)
    if not overwrite and not _may_replace(path / CARD_FILE):
        return path / PAGE_FILE, [
            f"{path / CARD_FILE} was edited, or is not ours, and stays as it is (--overwrite replaces it)"
        ]
    _write(path / CARD_FILE, card)
    return path / PAGE_FILE, []


def write_sweep_page(directory: Path, sweep: SweepReport) -> None:
    """Write `report.html` of a sweep into its directory."""
    write_atomically(directory / PAGE_FILE, _sweep_page(sweep))


def _sweep_page(sweep: SweepReport) -> str:
    from layer_surgery.reporting.sweep_page import sweep_page

    return sweep_page(sweep)


def _check(results: Sequence[Path], output: Path | None, base_model: str | None, overwrite: bool) -> None:
    if not results:
        raise UserError("give at least one directory that `layer-surgery compress` has written.")
    if output is None and len(results) > 1:
        raise OutputError(f"{len(results)} results make one page that belongs to none of them; give --output FILE.")
    if output is None and results[0].is_file():
        raise OutputError(f"{results[0]} is a file; give its directory, or --output FILE.")
    if output is not None and output.is_dir():
        raise OutputError(f"--output {output} is a directory; give the name of a file, such as {output / PAGE_FILE}.")
    if output is not None and output.exists() and not overwrite:
        raise OutputError(f"--output {output} exists already; choose another name, or pass --overwrite to replace it.")
    if base_model is not None and output is not None:
        raise UserError("--base-model is for the card of one result; leave out --output.")
    if base_model is not None and not is_valid_hub_id(base_model):
        raise UserError(f"--base-model '{base_model}' is no name on the hub; give OWNER/NAME.")


def _name(path: Path) -> str:
    resolved = path.resolve()
    return (resolved if resolved.is_dir() else resolved.parent).name or str(path)


@contextmanager
def _consistent(what: str) -> Iterator[None]:
    """Have what a stored record says where no type is checked (of its origin, data and settings) refused in words."""
    try:
        yield
    except LayerSurgeryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ReportError(f"{what} contradicts itself ({error!r}); make it again.") from error


def _compared(results: Sequence[Path]) -> str:
    """Return the page that compares results; all are read before anything is drawn."""
    from layer_surgery.reporting.compare import comparison_page

    return comparison_page([row for path in results for row in _rows(path)])


def _rows(path: Path) -> list[ResultRow]:
    """Return what a comparison takes from one of its arguments: a result, or all points of a sweep."""
    from layer_surgery.reporting.compare import result_row
    from layer_surgery.reporting.sweep_page import sweep_rows

    sweep = read_sweep(path, SWEEP_ADVICE)
    if sweep is not None:
        return list(sweep_rows(sweep, f"{_name(path)}: "))
    return [result_row(_name(path), read_report(report_file(path)))]


def _page(report: SurgeryReport, name: str, needs_code: bool) -> str:
    from layer_surgery.reporting.page import report_page  # matplotlib takes a while to import

    return report_page(report, name, needs_code=needs_code)


def _card(report: SurgeryReport, name: str, needs_code: bool) -> str:
    from layer_surgery.reporting.card import model_card

    return model_card(report, name, needs_code=needs_code)


def _needs_code(directory: Path, report: SurgeryReport) -> bool:
    """Whether the result loads with remote code only; where its configuration is gone, as far as the plan tells."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return config.get("model_type") == MODEL_TYPE or "auto_map" in config
    except (OSError, ValueError, AttributeError):
        return bool(report.plan.low_rank)


def _may_replace(card: Path) -> bool:
    from layer_surgery.reporting.card import is_unedited

    try:
        return is_unedited(card.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); give --output FILE elsewhere.") from error
