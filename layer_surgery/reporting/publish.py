"""Pages and cards, written for new results and for stored ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from layer_surgery.checkpoint.contents import PAGE_FILES
from layer_surgery.checkpoint.modeling_layer_surgery import MODEL_TYPE
from layer_surgery.checkpoint.origin import is_valid_hub_id
from layer_surgery.disk.reading import read_bytes, read_json, why
from layer_surgery.disk.writing import write_atomically
from layer_surgery.errors import LayerSurgeryError, OutputError, ReportError, UserError
from layer_surgery.records import SurgeryReport
from layer_surgery.records.reading import read_report, read_sweep, report_file
from layer_surgery.records.seal import is_unedited, sealed
from layer_surgery.records.sweep import SweepReport

# The modules that draw are imported where they are used: matplotlib takes a while.

PAGE_FILE, CARD_FILE = PAGE_FILES
SWEEP_ADVICE = "make it again with sweep"


def write_page_and_card(directory: Path, report: SurgeryReport, name: str, *, note: str = "") -> None:
    """Write `report.html` and `README.md` of a new result into its directory.

    Args:
        name: of the result; the directory may still have another one.
        note: what the reader must know first.
    """
    for file, text in zip(PAGE_FILES, _page_and_card(directory, report, name, note), strict=True):
        write_atomically(directory / file, text)


def write_sweep_page(directory: Path, sweep: SweepReport) -> None:
    """Write `report.html` of a sweep into its directory."""
    from layer_surgery.reporting.compare import sweep_page

    write_atomically(directory / PAGE_FILE, sweep_page(sweep))


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
        return _write(output, text, replace=overwrite), []
    sweep = read_sweep(results[0], SWEEP_ADVICE)
    if sweep is None:
        return _report_on_one(results[0], output, base_model, overwrite)
    if base_model is not None:
        raise UserError(f"--base-model is for the card of a result, and {results[0]} holds a sweep; leave it out.")
    from layer_surgery.reporting.compare import sweep_page

    with _consistent(f"the sweep of {results[0]}"):
        text = sweep_page(sweep)
    return _write(output or results[0] / PAGE_FILE, text, replace=output is None or overwrite), []


def _check(results: Sequence[Path], output: Path | None, base_model: str | None, overwrite: bool) -> None:
    """Refuse arguments that do not go together."""
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


def _report_on_one(path: Path, output: Path | None, base_model: str | None, overwrite: bool) -> tuple[Path, list[str]]:
    """Write the page of a result to `output`, or page and card into its directory."""
    report = read_report(report_file(path))
    if base_model is not None:
        report = replace(report, base_model=report.base_model | {"hub_id": base_model})
    with _consistent(f"the report of {path}"):
        page, card = _page_and_card(path if path.is_dir() else path.parent, report, _name(path))
    if output is not None:
        return _write(output, page, replace=overwrite), []
    card_file = path / CARD_FILE
    try:
        keep_card = not overwrite and card_file.exists() and not is_unedited(read_bytes(card_file).decode("utf-8"))
    except (OSError, ValueError):
        keep_card = True
    _write(path / PAGE_FILE, page)
    if keep_card:
        note = f"{card_file} was edited, or is not ours, and stays as it is (--overwrite replaces it)"
        return path / PAGE_FILE, [note]
    _write(card_file, card)
    return path / PAGE_FILE, []


def _page_and_card(directory: Path, report: SurgeryReport, name: str, note: str = "") -> tuple[str, str]:
    """Return the page and the card of the result in a directory."""
    from layer_surgery.reporting.card import model_card
    from layer_surgery.reporting.page import report_page

    code = needs_code(directory, report)
    page = report_page(report, name, needs_code=code, note=note)
    return sealed(page), model_card(report, name, needs_code=code, note=note)


def _compared(results: Sequence[Path]) -> str:
    """Return the page that compares results and all points of sweeps; all are read before anything is drawn."""
    from layer_surgery.reporting.compare import ResultRow, comparison_page, result_row, sweep_rows

    rows: list[ResultRow] = []
    for path in results:
        sweep = read_sweep(path, SWEEP_ADVICE)
        if sweep is not None:
            rows += sweep_rows(sweep, f"{_name(path)}: ")
        else:
            rows.append(result_row(_name(path), read_report(report_file(path))))
    return comparison_page(rows)


def _name(path: Path) -> str:
    resolved = path.resolve()
    return (resolved if resolved.is_dir() else resolved.parent).name or str(path)


def needs_code(directory: Path, report: SurgeryReport) -> bool:
    """Whether the result loads with remote code only; where its configuration is gone, as far as the plan tells."""
    try:
        config = read_json(directory / "config.json")
        return config.get("model_type") == MODEL_TYPE or "auto_map" in config
    except (OSError, ValueError, AttributeError):
        return bool(report.plan.smaller)


@contextmanager
def _consistent(what: str) -> Iterator[None]:
    """Refuse, in words, a stored record that is wrong where no type is checked (its origin, data and settings)."""
    try:
        yield
    except LayerSurgeryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ReportError(f"{what} contradicts itself ({error!r}); make it again.") from error


def _write(path: Path, text: str, *, replace: bool = True) -> Path:
    """Write a file, or raise `OutputError`; return where it is."""
    try:
        write_atomically(path, text, replace=replace)
    except FileExistsError:
        raise OutputError(f"--output {path} has appeared meanwhile and is not replaced; choose another name.") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({why(error)}); give --output FILE elsewhere.") from error
    return path
