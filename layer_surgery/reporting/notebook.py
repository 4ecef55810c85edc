"""Records in a notebook, as the pages that are made of them, and as text.

A page is put in a frame of its own (`srcdoc`), so that neither its style nor the names in its figures meet those of the
notebook or of other pages. It holds no scripts, and the frame would run none. Importing this module registers it.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from layer_surgery.records import EvaluationReport, LayerScores, SurgeryReport
from layer_surgery.records.shown import Drawing
from layer_surgery.records.sweep import SweepReport

if TYPE_CHECKING:
    from rich.console import Console

# The modules that draw are imported where they are used: jinja, matplotlib and rich take a while.

T = TypeVar("T")
#: Columns of printed tables.
_WIDTH = 110


def _surgery_page(report: SurgeryReport) -> str:
    from layer_surgery.reporting.page import report_page
    from layer_surgery.reporting.publish import needs_code

    directory = Path(report.output) if report.output is not None else None
    name = directory.name if directory is not None else "the result"
    code = bool(report.plan.smaller) if directory is None else needs_code(directory, report)
    return report_page(report, name, needs_code=code)


def _sweep_page(report: SweepReport) -> str:
    from layer_surgery.reporting.compare import sweep_page

    return sweep_page(report)


def _evaluation_page(report: EvaluationReport) -> str:
    from layer_surgery.reporting.page import evaluation_page

    return evaluation_page(report)


def _scores_page(scores: LayerScores) -> str:
    from layer_surgery.reporting.page import scores_page

    return scores_page(scores)


def _framed(page: Callable[[T], str], height: int) -> Callable[[T], str]:
    """Return a function that puts the page of a record in a frame, `height` pixels high; a reader can enlarge it."""

    def frame(record: T) -> str:
        style = f"width: 100%; height: {height}px; border: 0; resize: vertical; overflow: auto"
        allowed = "allow-popups allow-popups-to-escape-sandbox"  # for links that are opened in a new window
        return (
            f'<iframe title="Layer Surgery" sandbox="{allowed}" style="{style}" srcdoc="{html.escape(page(record))}">'
            "</iframe>"
        )

    return frame


def _printed(print_record: Callable[[Console, T], None]) -> Callable[[T], str]:
    """Return a function that gives what is printed of a record, as plain text."""

    def text(record: T) -> str:
        from rich.console import Console

        console = Console(
            file=io.StringIO(), width=_WIDTH, force_terminal=False, force_jupyter=False, color_system=None
        )
        print_record(console, record)
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    return text


def _print_surgery(console: Console, report: SurgeryReport) -> None:
    from layer_surgery.reporting.console import print_report

    print_report(console, report)


def _print_evaluation(console: Console, report: EvaluationReport) -> None:
    from layer_surgery.reporting.console import print_evaluation

    print_evaluation(console, report, str(report.provenance.get("model") or "model"))


def _print_scores(console: Console, scores: LayerScores) -> None:
    from layer_surgery.reporting.console import print_scores

    print_scores(console, scores)


def _print_sweep(console: Console, report: SweepReport) -> None:
    from layer_surgery.reporting.console import print_sweep

    print_sweep(console, report)


SurgeryReport.shown_by(Drawing(_framed(_surgery_page, 760), _printed(_print_surgery)))
SweepReport.shown_by(Drawing(_framed(_sweep_page, 760), _printed(_print_sweep)))
EvaluationReport.shown_by(Drawing(_framed(_evaluation_page, 520), _printed(_print_evaluation)))
LayerScores.shown_by(Drawing(_framed(_scores_page, 460), _printed(_print_scores)))
