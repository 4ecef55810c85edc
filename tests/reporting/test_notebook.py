"""What the Python functions return, shown in a notebook and printed."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pages import NASTY, Page, checked, full_report

import layer_surgery
from layer_surgery import EvaluationReport, LayerScores, SurgeryReport, SweepReport
from layer_surgery.records.seal import is_unedited
from layer_surgery.records.shown import Shown


class Outside(HTMLParser):
    """What a notebook itself sees of a record: tags with their attributes, and text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def framed(record: Shown) -> Page:
    """Return the page that a notebook shows, after a check that nothing of it is outside of its frame."""
    outside = Outside(record._repr_html_() or "")
    ((tag, attributes),) = outside.tags
    assert tag == "iframe" and not outside.text.strip()
    assert "allow-scripts" not in (attributes["sandbox"] or "") and "allow-same-origin" not in attributes["sandbox"]
    return checked(attributes["srcdoc"] or "")


@pytest.fixture(scope="module")
def evaluation(model: Path, options: dict[str, Any]) -> EvaluationReport:
    data = {"eval_data": options["eval_data"], "sequence_length": 16}
    return layer_surgery.evaluate(model, baseline=model, continuations=1, **data)


@pytest.fixture(scope="module")
def scores(model: Path, options: dict[str, Any]) -> LayerScores:
    data = {"calibration": options["calibration"], "samples": 4, "sequence_length": 16}
    return layer_surgery.score(model, scorer="block_influence", **data)


@pytest.fixture(scope="module")
def sweep(model: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> SweepReport:
    output = tmp_path_factory.mktemp("sweep") / "sweep"
    given = {name: value for name, value in options.items() if name not in ("target_layers", "keep", "continuations")}
    return layer_surgery.sweep(model, output, target_layers=[4, 3], scorer="last", method="svd", **given)


def test_a_report_is_shown_as_its_page(result: tuple[Path, SurgeryReport]) -> None:
    page = framed(result[1])
    saved = (result[0] / "report.html").read_text(encoding="utf-8")
    assert is_unedited(saved) and saved.startswith(page.html.rstrip())  # the file has a seal behind it
    assert page.figures


def test_a_report_that_is_nowhere_saved_is_shown_too(result: tuple[Path, SurgeryReport]) -> None:
    assert "the result" in framed(replace(full_report(result[1]), output=None)).text


def test_an_evaluation_is_shown_with_its_measurements(evaluation: EvaluationReport) -> None:
    page = framed(evaluation)
    for text in (f"{evaluation.model.parameters:,}", "perplexity", "baseline", "change", "Continuations"):
        assert text in page.text
    alone = framed(replace(evaluation, baseline=None, comparison=None))
    assert "measured alone" in alone.text and "change" not in alone.text and "interval" not in alone.text


def test_scores_are_shown_in_their_order(scores: LayerScores) -> None:
    page = framed(scores)
    order = enumerate(scores.removal_order, start=1)
    places = [page.html.index(f"<td>{place}</td><td>{layer}</td>") for place, layer in order]
    assert places == sorted(places) and scores.quantity in page.text


def test_a_sweep_is_shown_with_its_points(sweep: SweepReport) -> None:
    page = framed(sweep)
    assert "2 results side by side" in page.text and page.figures


def test_hostile_text_stays_text(
    result: tuple[Path, SurgeryReport], evaluation: EvaluationReport, scores: LayerScores
) -> None:
    records = (
        full_report(result[1], NASTY),
        replace(evaluation, provenance={"model": NASTY, "baseline": NASTY}),
        replace(scores, quantity=NASTY, scorer=NASTY, provenance={"model": NASTY}),
    )
    for record in records:
        assert "<script>alert('x')</script>" in framed(record).text


@pytest.mark.parametrize("name", ["result", "evaluation", "scores", "sweep"])
def test_print_gives_tables_and_repr_all_fields(name: str, request: pytest.FixtureRequest) -> None:
    value = request.getfixturevalue(name)
    record = value[1] if name == "result" else value
    text = str(record)
    expected = {
        "result": "3 of 5 layers whole",
        "evaluation": "baseline",
        "scores": "goes  layer",
        "sweep": "parameters",
    }[name]
    assert expected in text and "\x1b" not in text and len(text.splitlines()) > 3
    assert repr(record).startswith(f"{type(record).__name__}(")


def test_without_what_draws_a_record_is_its_repr() -> None:
    class Plain(Shown):
        pass

    plain = Plain()
    assert str(plain) == repr(plain) and plain._repr_html_() is None
