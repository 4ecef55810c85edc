"""The report page, the comparison of several results, and the command that makes them again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from pages import NASTY, checked, full_report
from tiny_checkpoints import CommandLine, edit_json, listing, tensors_of

import layer_surgery
from layer_surgery import SurgeryReport
from layer_surgery.records import REPORT_SCHEMA_VERSION, Interval, LayerPlan, LayerScores
from layer_surgery.records.reading import read_report
from layer_surgery.reporting.compare import comparison_page, result_row, warnings
from layer_surgery.reporting.derived import kept_count
from layer_surgery.reporting.figures.tradeoff import Point, undominated
from layer_surgery.reporting.formats import number_list
from layer_surgery.reporting.page import report_page
from layer_surgery.reporting.sentences import budgets, summary
from layer_surgery.surgeon.spectra import MAX_POINTS, log_spaced, spectrum_record

Result = tuple[Path, SurgeryReport]

# The page


def test_compress_writes_a_page_with_every_section(result: Result) -> None:
    page = checked((result[0] / "report.html").read_text(encoding="utf-8"))
    titles = [figure["title"] for figure in page.figures]
    assert titles[:2] == ["Rise of the loss: predicted and measured", "Cost, as a share of the original's"]
    assert "Importance of every layer" in titles and "Ranks and channels that were kept" in titles
    assert "Singular values, and what was kept" in titles
    for heading in ("Before and after", "Layers", "Spectra", "Continuations", "Loading it", "How it was made"):
        assert heading in page.text
    report = result[1]
    assert f"{report.after.parameters:,}" in page.text
    change = next(iter(report.comparison.perplexity.values())).ratio
    assert f"x {change.value:.3f} [{change.low:.3f}, {change.high:.3f}]" in page.text
    for layer in report.plan.low_rank:
        assert all(f"<td>{rank}</td>" in page.html for rank in layer.ranks.values())
    assert "trust_remote_code=True" in page.text


def test_tasks_speed_and_failures_are_shown(result: Result) -> None:
    page = checked(report_page(full_report(result[1]), "smaller", needs_code=False))
    titles = [figure["title"] for figure in page.figures]
    assert "Tasks, before and after" in titles and "Tasks, paired difference" in titles
    assert "-0.0500 [-0.1000,\u00a0+0.0100]" in page.text.replace("\n", " ")
    assert "decoding speed, 2 x 16 125.0" in next(f["desc"] for f in page.figures if f["title"].startswith("Cost"))
    assert "speed failed:" in page.text
    assert "trust_remote_code=True" not in page.text
    assert "layer-surgery compress 'a text'" in page.text


def test_hostile_text_stays_text(result: Result) -> None:
    report = full_report(result[1], NASTY)
    assert report.scores is not None
    scores = replace(report.scores, scorer=NASTY, quantity=NASTY)
    page = checked(report_page(replace(report, scores=scores), NASTY, needs_code=True))
    assert "<script>alert('x')</script>" in page.text
    assert "\u2400" in page.text and "\ufffd" in page.text
    page = checked(comparison_page([result_row(NASTY, report), result_row("other", report)]))
    assert "<script>alert('x')</script>" in page.text


def test_what_was_not_measured_is_left_out(model: Path, tmp_path: Path) -> None:
    layer_surgery.compress(model, tmp_path / "out", layers=[1, 2], keep=0, refit=False, eval_data=None)
    page = checked((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert [figure["title"] for figure in page.figures] == ["Cost, as a share of the original's"]
    assert "Removed 2 of 5 layers (1, 2)." in page.text
    assert "was not compared" in page.text and "no calibration data" in page.text
    assert "Spectra" not in page.text and "Continuations" not in page.text


def test_many_layers_of_an_odd_model(result: Result) -> None:
    """No layer is drawn over another, and values that a logarithm does not take are no reason to fail."""
    report, count = result[1], 90
    spectrum, values = report.spectra[0], [math.sin(k) for k in range(count)]
    layers = [LayerPlan(index=k, action="low_rank", ranks={"a.c_proj": 0, "b.c_proj": k}) for k in range(count)]
    report = replace(
        report,
        plan=replace(report.plan, layers=layers),
        scores=LayerScores(scorer="s", source="", quantity="q", values=values, removal_order=[3]),
        spectra=[
            replace(spectrum, layer=k, linear=name, values=[0.0] * len(spectrum.values), kept=[])
            for k in range(count)
            for name in ("a.c_proj", "b.c_proj")
        ],
    )
    page = checked(report_page(report, "odd", needs_code=True))
    assert page.text.count("low-rank") >= count
    assert "a.c_proj" in page.text


def test_the_same_report_gives_the_same_page(result: Result) -> None:
    first = report_page(result[1], "x", needs_code=True)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": False}):
        assert report_page(result[1], "x", needs_code=True) == first
        assert matplotlib.rcParams["font.size"] == 30


def test_the_summary_says_what_was_done_saved_and_lost(result: Result) -> None:
    sentences = " ".join(summary(full_report(result[1])))
    before, after = result[1].before.parameters, result[1].after.parameters
    assert "Replaced linears of 2 of 5 layers" in sentences
    assert f"{100 * (1 - after / before):.1f} % fewer parameters" in sentences
    assert "Decoding at x 1.25 of the speed" in sentences
    assert "Task all of a text (acc): 0.600 before, 0.600 after, -0.050 [-0.100, +0.010]" in sentences


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([1, 2], "1, 2"), ([7, 1, 2, 3, 9], "1-3, 7, 9")], ids=str
)
def test_numbers_in_a_row_are_drawn_together(numbers: list[int], text: str) -> None:
    assert number_list(numbers) == text


# Spectra


def test_spectra_are_those_of_the_weights(model: Path, options: dict[str, Any], tmp_path: Path) -> None:
    report = layer_surgery.compress(model, tmp_path / "out", **options | {"method": "svd"})
    tensors = tensors_of(model)
    assert len(report.spectra) == sum(len(layer.ranks) for layer in report.plan.low_rank)
    for record in report.spectra:
        true = torch.linalg.svdvals(tensors[f"model.layers.{record.layer}.{record.linear}.weight"].float())
        assert record.metric == "weight" and record.total == len(true)
        assert record.rank == report.plan.layers[record.layer].ranks[record.linear]
        assert record.values == pytest.approx(true[[c - 1 for c in record.components]].tolist(), rel=1e-3)
        assert record.kept_share == pytest.approx(float((true[: record.rank] ** 2).sum() / (true**2).sum()), abs=1e-5)
    assert read_report(tmp_path / "out" / "surgery.json").spectra == report.spectra


@pytest.mark.parametrize(
    ("method", "metric"),
    [("fisher", "fisher"), ("svd_llm", "inputs"), ("grasp", "weight"), ("grasp_sequential", "weight")],
)
def test_every_method_that_decomposes_leaves_its_spectra(
    model: Path, options: dict[str, Any], method: str, metric: str
) -> None:
    report = layer_surgery.compress(model, no_save=True, **options | {"method": method, "refit": False})
    ranks = {(layer.index, name): rank for layer in report.plan.low_rank for name, rank in layer.ranks.items()}
    assert {(record.layer, record.linear): record.rank for record in report.spectra} == ranks
    for record in report.spectra:
        assert record.metric == metric
        assert record.values == sorted(record.values, reverse=True)
        if method.startswith("grasp") and len(record.values) == record.total:
            assert sum(record.kept) == record.rank
        assert bool(record.kept) == method.startswith("grasp")


@pytest.mark.parametrize("total", [1, 2, 47, 48, 49, 60, 500, 16384])
def test_thinned_spectra_have_both_ends_and_nothing_twice(total: int) -> None:
    indices = log_spaced(total, MAX_POINTS)
    assert len(indices) == min(total, MAX_POINTS)
    assert indices[0] == 0 and indices[-1] == total - 1
    assert all(a < b for a, b in pairwise(indices))


def test_chosen_components_are_marked() -> None:
    record = spectrum_record(3, "q", "weight", [4.0, 2.0, 1.0], {0, 2})
    assert record.kept == [True, False, True] and record.rank == 2
    assert record.kept_share == pytest.approx(17 / 21, abs=1e-6)
    assert spectrum_record(3, "q", "weight", [0.0], 1).kept_share == 0.0


# The command


def test_report_makes_page_and_card_again_without_the_model(run: CommandLine, copy: Path) -> None:
    before = listing(copy)
    (copy / "report.html").unlink()
    (copy / "README.md").unlink()
    outcome = run("report", copy)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == f"page: {copy / 'report.html'}\n"
    assert listing(copy) == before


def test_an_edited_card_stays_unless_it_may_be_replaced(run: CommandLine, copy: Path) -> None:
    card = (copy / "README.md").read_text(encoding="utf-8")
    (copy / "README.md").write_text(card.replace("# `smaller`", "# My model"), encoding="utf-8")
    outcome = run("report", copy)
    assert outcome.code == 0 and "was edited" in outcome.err
    assert "# My model" in (copy / "README.md").read_text(encoding="utf-8")
    assert run("report", copy, "--overwrite").code == 0
    assert (copy / "README.md").read_text(encoding="utf-8") == card


def test_a_page_elsewhere_leaves_the_result_alone(run: CommandLine, copy: Path, tmp_path: Path) -> None:
    before = listing(copy)
    assert run("report", copy / "surgery.json", "--output", tmp_path / "page.html").code == 0
    assert listing(copy) == before
    assert (tmp_path / "page.html").read_bytes() == (copy / "report.html").read_bytes()
    outcome = run("report", copy, "--output", tmp_path / "page.html")
    assert outcome.code == 2 and "exists already" in outcome.err
    assert run("report", copy, "--output", tmp_path / "page.html", "--overwrite").code == 0


def test_a_report_of_the_first_schema_is_read(run: CommandLine, copy: Path) -> None:
    edit_json(copy / "surgery.json", schema_version=1, spectra=None)
    base = json.loads((copy / "surgery.json").read_text())["base_model"]
    edit_json(copy / "surgery.json", base_model={k: v for k, v in base.items() if k not in ("hub_id", "licence")})
    assert run("report", copy).code == 0
    page = checked((copy / "report.html").read_text(encoding="utf-8"))
    assert "Spectra" not in page.text and "Layers" in page.text


def damaged(**changes: Any) -> Any:
    return lambda path: edit_json(path, **changes)


def nested(*keys: str, value: Any) -> Any:
    def edit(path: Path) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        inner = data
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(data), encoding="utf-8")

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (damaged(schema_version=REPORT_SCHEMA_VERSION + 1), "take a newer layer-surgery"),
        (damaged(schema_version="1"), "its schema_version is '1'"),
        (damaged(schema_version=None), "its schema_version is None"),
        (damaged(plan=None), "not the report of a compression"),
        (damaged(plan=[]), "not the report of a compression"),
        (damaged(after=None), "damaged at 'after'"),
        (damaged(continuations=[{"prompt": 1}]), "damaged at 'continuations.0"),
        (damaged(before=[1, 2]), "damaged at 'before'"),
        (nested("after", "parameters", value="many"), "damaged at 'after.parameters'"),
        (nested("plan", "layers", value=[{"index": 4}]), "entry 0 of 'layers'"),
        (nested("scores", "values", value=[1.0]), "1 scores for 5 layers"),
        (nested("scores", "removal_order", value=[77]), "a layer beyond"),
        (nested("scores", "values", value=[float("nan")] * 5), "NaN"),
        (nested("base_model", "name", value=7), "base_model has no name"),
        (nested("base_model", "licence", value=["mit"]), "contradicts itself"),
        (nested("base_model", "licence", value={"library_name": "mine"}), "contradicts itself"),
        (nested("provenance", "packages", value=["torch"]), "contradicts itself"),
        (lambda path: path.write_text(path.read_text()[:500]), "not JSON"),
        (lambda path: path.write_text(path.read_text().replace('"seed": 0', '"seed": 1e999')), "too large"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not JSON"),
        (lambda path: path.write_text("[" * 100_000), "not JSON"),
        (lambda path: path.write_text("[]"), "not an object"),
        (lambda path: path.unlink(), "has no surgery.json"),
    ],
)
def test_what_is_no_report_is_refused_with_one_sentence(run: CommandLine, copy: Path, edit: Any, words: str) -> None:
    edit(copy / "surgery.json")
    before = listing(copy)
    outcome = run("report", copy)
    assert outcome.code == 2
    assert len(outcome.error_lines) == 1 and words in outcome.err and outcome.err.startswith("error: ")
    assert outcome.out == "" and listing(copy) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/none"], "there is no directory"),
        (["{}", "{}"], "give --output FILE"),
        (["{}/surgery.json"], "is a file"),
        (["{}", "--output", "{}"], "is a directory"),
        (["{}", "--output", "{}/none/page.html"], "cannot be written"),
        (["{}", "--base-model", "a/b/c"], "is no name on the hub"),
        (["{}", "--base-model", "a/b", "--output", "{}/x.html"], "leave out --output"),
        ([], "Missing argument"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(run: CommandLine, copy: Path, arguments: list[str], words: str) -> None:
    before = listing(copy)
    outcome = run("report", *(argument.format(copy) for argument in arguments))
    assert outcome.code == 2 and words in outcome.err and len(outcome.error_lines) == 1
    assert listing(copy) == before


def test_an_interrupted_writing_leaves_the_old_page(
    run: CommandLine, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(copy)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    outcome = run("report", copy)
    assert outcome.code == 2 and "No space left" in outcome.err
    assert listing(copy) == before


# In a compression


def test_a_failure_of_the_page_does_not_lose_the_model(
    run: CommandLine, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ValueError("no ink")

    monkeypatch.setattr("layer_surgery.reporting.page.report_page", fail)
    output = tmp_path / "out"
    outcome = run("compress", model, "--layers", "1,2", "--keep", 0, "--no-refit", "--no-eval", "--output", output)
    assert outcome.code == 1 and "report page failed: ValueError: no ink" in outcome.err
    assert "page:" not in outcome.out
    assert layer_surgery.load(output).config.num_hidden_layers == 3
    stored = read_report(output / "surgery.json")
    assert [failure.stage for failure in stored.failures] == ["report page"]
    monkeypatch.undo()
    checked(report_page(stored, "out", needs_code=False))


def test_a_result_with_page_and_card_can_be_replaced(run: CommandLine, model: Path, tmp_path: Path) -> None:
    arguments = ["compress", model, "--layers", "1", "--keep", 0, "--no-refit", "--no-eval", "--output", tmp_path / "o"]
    outcome = run(*arguments)
    assert outcome.code == 0 and outcome.out.rstrip().endswith(f"page: {tmp_path / 'o' / 'report.html'}")
    assert {"report.html", "README.md", "surgery.json"} <= {path.name for path in (tmp_path / "o").iterdir()}
    assert run(*arguments, "--overwrite").code == 0
    (tmp_path / "o" / "mine.txt").write_text("mine")
    assert run(*arguments, "--overwrite").code == 2


# Several results


def test_results_are_compared(
    run: CommandLine, copy: Path, model: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "removed"
    report = layer_surgery.compress(model, other, **options | {"keep": 0, "refit": False})
    outcome = run("report", copy, other, "--output", tmp_path / "both.html")
    assert outcome.code == 0 and outcome.err == ""
    page = checked((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert page.figures[0]["title"].startswith("Perplexity against size")
    assert "1. smaller" in page.text and "2. removed" in page.text
    assert f"{report.after.parameters:,}" in page.text
    assert page.text.count("(nothing kept)") == 1
    assert 'class="warning"' not in page.html
    edit_json(other / "surgery.json", schema_version=99)
    outcome = run("report", copy, other, "--output", tmp_path / "again.html")
    assert outcome.code == 2 and str(other) in outcome.err and not (tmp_path / "again.html").exists()


def test_equal_results_share_a_label(result: Result) -> None:
    row = result_row("a", result[1])
    page = checked(comparison_page([row, row, replace(row, after=replace(row.after, parameters=1))]))
    assert "<text" in page.html and ">1, 2</text>" in page.html and ">3</text>" in page.html


def test_results_that_should_not_be_compared_say_so(result: Result) -> None:
    row = result_row("a", result[1])
    assert list(warnings([row, row])) == []
    other = replace(row, base=row.base | {"sha256": "0" * 64})
    assert "not all made from the same original" in next(warnings([row, other]))
    moved = {text: replace(found, data_sha256="0" * 64) for text, found in row.after.perplexity.items()}
    other = replace(row, after=replace(row.after, perplexity=moved))
    assert "same windows" in next(warnings([row, other]))


def test_only_results_that_nothing_undercuts_are_filled() -> None:
    places = [(80, 1.1), (70, 1.3), (80, 1.2), (60, 1.3), (60, 1.3)]
    points = [
        Point(number, share, Interval(value=ratio, low=1, high=2, confidence=0.95, pairs=9), "svd")
        for number, (share, ratio) in enumerate(places)
    ]
    assert [point.number for point in undominated(points)] == [0, 3, 4]


# Budgets and heads


def test_budgets_are_beside_what_was_reached(result: Result) -> None:
    report = result[1]
    plan, before = report.plan, report.before
    (sentence,) = budgets(report)
    share = 100 * plan.parameter_bound / before.parameters
    assert f"at most {plan.parameter_bound:,} parameters ({share:.1f} % of the original's)" in sentence
    assert f"reached: {report.after.parameters:,}" in sentence and sentence in summary(report)
    assert before.flops_per_token is not None and report.after.flops_per_token is not None
    tighter = replace(report, plan=replace(plan, bounds={"flops": 0.5 * before.flops_per_token}))
    flops = list(budgets(tighter))[1]
    assert "FLOPs per token (50.0 %" in flops and f"reached: {report.after.flops_per_token:,}" in flops
    assert not list(budgets(replace(report, plan=replace(plan, parameter_bound=before.parameters))))


def test_kept_heads_say_of_how_many(result: Result) -> None:
    layer = LayerPlan(index=1, action="reduce", ranks={"mlp.up_proj": 3}, heads=1)
    spectrum = replace(result[1].spectra[0], layer=1, linear="self_attn.o_proj", units="heads", total=2)
    assert kept_count(layer, "heads", [spectrum]) == "1 of 2"
    assert kept_count(layer, "heads", []) == "1"
    assert kept_count(layer, "mlp.up_proj", [spectrum]) == "3" and kept_count(layer, "other", [spectrum]) == ""
