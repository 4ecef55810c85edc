"""A sweep from a directory to a directory: every point is what `compress` gives, also if the sweep was stopped."""

from __future__ import annotations

import csv
import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import CommandLine, edit_json, listing, saved_model, strict_json, tensors_of, text_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import layer_surgery
from layer_surgery import SweepPoint, SweepReport
from layer_surgery.errors import NumericalError, OutputError, UserError
from layer_surgery.records import SurgeryPlan
from layer_surgery.records.reading import read_sweep
from layer_surgery.reporting.compare import sweep_rows
from layer_surgery.runs.bench import Bench
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.sweep.measuring import Measuring
from layer_surgery.runs.sweep.state import sweep_directory
from layer_surgery.scoring import SCORERS, ScoringContext
from layer_surgery.scoring.context import Ranking
from layer_surgery.walk.boundaries import BoundaryStore

SEQUENCE = 16
Options = dict[str, Any]
Sweep = Callable[..., SweepReport]
Swept = tuple[Path, SweepReport]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"), layers=5)


@pytest.fixture(scope="module")
def options(text: Path) -> Options:
    return {"calibration": text, "eval_data": [text], "samples": 8, "sequence_length": SEQUENCE, "eval_windows": 6}


#: Methods and scorers of all kinds; a fraction that needs more components than the statistics usually hold.
GRID: Options = {
    "target_layers": [4, 3],
    "keep": [0, 0.3, 1],
    "method": ["fisher", "grasp", "remove"],
    "scorer": ["fisher", "perplexity"],
}


@pytest.fixture(scope="module")
def swept(model: Path, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    output = tmp_path_factory.mktemp("swept") / "output"
    return output, layer_surgery.sweep(model, output, **GRID, **options)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with every model that is measured."""
    seen: list[str] = []
    measure = Evaluator.measure

    def counted(self: Evaluator, moment: Any, checkpoint: Any) -> None:
        seen.append(moment)
        measure(self, moment, checkpoint)

    monkeypatch.setattr(Evaluator, "measure", counted)
    return seen


@pytest.fixture
def sweep(model: Path, options: Options, tmp_path: Path) -> Sweep:
    """Return what sweeps the model into `output`, with the layers chosen from the end unless told."""
    return lambda **more: layer_surgery.sweep(model, tmp_path / "output", **{"scorer": "last"} | options | more)


REMOVE_TWO = ("--target-layers", 3, "--method", "remove")


@pytest.fixture
def command(model: Path, text: Path, tmp_path: Path) -> list[Any]:
    """The arguments of a sweep into `output`, to which more may be added."""
    data = ["--calibration", text, "--eval-data", text, "--samples", 8, "--sequence-length", SEQUENCE]
    return ["sweep", model, *data, "--output", tmp_path / "output"]


def results(output: Path) -> Any:
    """Return what `sweep.json` holds, without what differs from run to run."""
    data = strict_json((output / "sweep.json").read_text(encoding="utf-8"))
    data.pop("provenance")
    for point in data["points"]:
        point.pop("seconds")
    return data


def point_of(report: SweepReport, **settings: Any) -> SweepPoint:
    [point] = [p for p in report.points if all(getattr(p, name) == value for name, value in settings.items())]
    return point


# Points


@pytest.mark.parametrize(
    "settings",
    [
        {"target_layers": 3, "keep": 0.3, "method": "fisher", "scorer": "fisher"},
        {"target_layers": 4, "keep": 0.3, "method": "fisher", "scorer": "perplexity"},
        {"target_layers": 3, "keep": 1, "method": "fisher", "scorer": "perplexity"},
        {"target_layers": 3, "keep": 0, "method": "fisher", "scorer": "fisher"},
        {"target_layers": 3, "keep": 0.3, "method": "grasp", "scorer": "perplexity"},
        {"target_layers": 3, "keep": 0, "method": "remove", "scorer": "fisher"},
        {"target_layers": 4, "keep": 0, "method": "grasp", "scorer": "fisher"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_point_is_what_compress_gives(swept: Swept, model: Path, options: Options, settings: Options) -> None:
    alone = layer_surgery.compress(model, no_save=True, continuations=0, **settings, **options)
    point = point_of(swept[1], **settings)
    assert point.status == "done" and point.plan is not None
    assert point.plan.layers == alone.plan.layers
    assert point.plan.base_sha256 == alone.plan.base_sha256
    assert (point.plan.method, point.plan.refit) == (alone.plan.method, alone.plan.refit)
    assert point.plan.predicted_loss_rise == pytest.approx(alone.plan.predicted_loss_rise)
    assert point.predicted_loss_rise == point.plan.predicted_loss_rise
    assert point.scores == alone.scores
    assert point.result == alone.after
    assert point.comparison == alone.comparison
    assert point.parameters == alone.after.parameters
    assert point.layers == [layer.index for layer in alone.plan.operated]
    assert swept[1].original == alone.before
    name = next(iter(alone.comparison.perplexity))
    assert point.perplexity_ratio == pytest.approx(alone.comparison.perplexity[name].ratio.value)


@pytest.mark.parametrize("remove", ["mlp", "layer"])
def test_with_a_cache_and_for_parts_of_layers_it_is_the_same(
    model: Path, options: Options, tmp_path: Path, remove: Any
) -> None:
    more = {"remove": remove, "scorer": "fisher", "cache": tmp_path / "cache"} | options
    grid = {"target_layers": [3], "keep": [0, 0.4], "method": ["fisher", "svd"]}
    report = layer_surgery.sweep(model, tmp_path / "output", **grid, **more)
    assert [point.status for point in report.points] == ["done"] * 4
    for point in report.points:
        settings = {"target_layers": 3, "keep": point.keep, "method": point.method}
        alone = layer_surgery.compress(model, no_save=True, **settings, **more)
        assert point.plan is not None and point.plan.layers == alone.plan.layers
        assert point.result == alone.after
        assert point.predicted_loss_rise == pytest.approx(alone.plan.predicted_loss_rise)


def test_every_combination_is_there_once_and_removing_methods_have_one_point(swept: Swept) -> None:
    settings = [point.settings for point in swept[1].points]
    assert len(set(settings)) == len(settings) == 2 * 2 * (3 + 3 + 1)
    assert {point.keep for point in settings if point.method == "remove"} == {0.0}
    assert {point.method for point in settings if point.refit} == {"fisher"}


def test_points_of_the_same_model_are_measured_once(sweep: Sweep, measured: list[str]) -> None:
    report = sweep(target_layers=3, keep=0, method=["remove", "svd", "grasp"])
    assert measured == ["before", "after"]
    assert [point.method for point in report.points] == ["grasp", "remove", "svd"]
    assert [point.plan.method for point in report.points if point.plan] == ["grasp", "remove", "svd"]
    assert len({json.dumps(point["result"]) for point in report.to_dict()["points"]}) == 1


def test_nothing_but_the_results_is_left(swept: Swept) -> None:
    output = swept[0]
    assert {path.name for path in output.iterdir()} == {"sweep.json", "sweep.csv", "sweep.md", "report.html"}
    assert [path.name for path in output.parent.iterdir()] == ["output"]


def test_scores_are_computed_once_for_what_the_scorer_depends_on(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[tuple[str, int | None]] = []

    def counted(name: str) -> Any:
        rank = SCORERS[name].rank

        def scorer(context: ScoringContext) -> Ranking:
            ranked.append((name, context.count))
            return rank(context)

        return replace(SCORERS[name], rank=scorer)

    entries = {name: counted(name) for name in ("block_influence", "angular")}
    monkeypatch.setattr("layer_surgery.runs.bench.SCORERS", entries)
    sweep(target_layers=[4, 3], keep=[0.2, 0.3], method="svd", scorer=["block_influence", "angular"])
    assert sorted(ranked) == [("angular", 1), ("angular", 2), ("block_influence", 1)]


# Going on


def test_a_stopped_sweep_goes_on_and_ends_the_same(
    swept: Swept,
    model: Path,
    options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: list[str],
) -> None:
    measure, begun = Measuring.point, []

    def stopping(self: Measuring, config: Any, settings: Any) -> SweepPoint:
        begun.append(settings)
        if len(begun) == 9:
            raise KeyboardInterrupt
        return measure(self, config, settings)

    monkeypatch.setattr(Measuring, "point", stopping)
    output = tmp_path / "output"
    with pytest.raises(KeyboardInterrupt):
        layer_surgery.sweep(model, output, **GRID, **options)
    found = read_sweep(output, "give another")
    assert found is not None and [point.settings for point in found.points][:8] == begun[:8]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    layer_surgery.sweep(model, output, **GRID, **options)
    assert len(begun) == len(set(begun)) + 1  # the one that was stopped is begun again, and no other
    assert results(output) == results(swept[0])
    count = len(measured)
    left = output / ".best.lock"  # by a run that could not remove it
    left.touch()
    layer_surgery.sweep(model, output, **GRID, **options)
    assert len(measured) == count
    assert not left.exists()


def test_a_larger_grid_uses_the_points_that_are_there(sweep: Sweep, measured: list[str]) -> None:
    first = sweep(method="svd", target_layers=3, keep=0.3)
    second = sweep(method="svd", target_layers=[4, 3], keep=[0.3])
    assert measured == ["before", "after", "before", "after"]
    assert [point.target_layers for point in second.points] == [4, 3]
    assert second.points[1].result == first.points[0].result
    assert second.points[1].fronts == ["parameters"]


def test_another_place_of_the_same_data_is_the_same_sweep(
    sweep: Sweep, text: Path, tmp_path: Path, measured: list[str]
) -> None:
    sweep(method="remove", target_layers=[3])
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text.read_bytes())
    report = sweep(method="remove", target_layers=[3, 4], calibration=moved, eval_data=[moved])
    assert len(measured) == 4
    assert {name for point in report.points if point.result for name in point.result.perplexity} == {str(text)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "--seed was 0 and is 1"),
        ({"samples": 9}, "--samples was 8 and is 9"),
        ({"eval_windows": 5}, "--eval-windows was 6 and is 5"),
        ({"refit_general": 0.5}, "--refit-general"),
        ({"distance": False}, "--distance was True and is False"),
        ({"dtype": "bfloat16"}, "--dtype was float32 and is bfloat16"),
        ({"remove": "mlp"}, "--remove was layer and is mlp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_are_refused_by_name(
    swept: Swept, model: Path, options: Options, change: Options, named: str
) -> None:
    output, before = swept[0], listing(swept[0])
    grid = {"target_layers": 3, "method": "remove", "scorer": "last"}
    with pytest.raises(OutputError) as error:
        layer_surgery.sweep(model, output, **grid, **options | change)
    assert named in str(error.value) and "--overwrite" in str(error.value)
    assert listing(output) == before


def test_another_model_or_text_is_refused(swept: Swept, model: Path, options: Options, tmp_path: Path) -> None:
    other = saved_model(tmp_path / "model", layers=5, seed=1)
    text = text_file(tmp_path / "text.txt", seed=1)
    with pytest.raises(OutputError, match="the model \\(sha256\\) was"):
        layer_surgery.sweep(other, swept[0], target_layers=3, **options)
    with pytest.raises(OutputError, match="--eval-data \\(sha256 of the tokens\\) was"):
        layer_surgery.sweep(model, swept[0], target_layers=3, **options | {"eval_data": [text]})


def test_overwrite_starts_anew_and_removes_the_old_best(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> SweepPoint:
        raise KeyboardInterrupt

    output = tmp_path / "output"
    sweep(method="remove", target_layers=3, best="perplexity<=1000x")
    assert (output / "best").is_dir() and (output / "report.html").is_file()
    again: Options = {"method": "remove", "target_layers": 4, "seed": 1, "overwrite": True}
    with monkeypatch.context() as patch:
        patch.setattr(Measuring, "point", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(**again)
    assert not (output / "report.html").exists()  # it was of other points
    report = sweep(**again)
    assert [point.target_layers for point in report.points] == [4]
    assert report.best is None and not (output / "best").exists()


# What fails


def test_a_point_that_fails_is_recorded_and_tried_again(
    run: CommandLine, command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out = Bench.operate

    def failing(self: Bench, plan: SurgeryPlan, method: str, *arguments: Any, **keywords: Any) -> Any:
        if method == "svd":
            raise NumericalError("a number of svd is not finite.")
        return carry_out(self, plan, method, *arguments, **keywords)

    output = tmp_path / "output"
    command += ["--target-layers", 3, "--keep", 0.3, "--scorer", "last", "--no-refit", "--method"]
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "operate", failing)
        outcome = run(*command, "svd,fisher")
    assert outcome.code == 1
    assert outcome.error_lines[-1] == "error: 1 of 2 points failed; the same command tries them again."
    assert "a number of svd is not finite." in outcome.out
    found = {point["method"]: point for point in results(output)["points"]}
    assert found["svd"]["status"] == "failed" and found["svd"]["error"] == "a number of svd is not finite."
    assert found["svd"]["fronts"] == [] and found["svd"]["result"] is None
    assert found["fisher"]["status"] == "done" and found["fisher"]["fronts"] == ["parameters"]
    assert run(*command, "fisher").code == 0  # the one that failed is not asked for
    assert run(*command, "svd,fisher").code == 0
    assert {point["status"] for point in results(output)["points"]} == {"done"}
    assert len(results(output)["points"]) == 2


def test_a_point_that_its_layers_do_not_allow_fails_alone(sweep: Sweep, model: Path) -> None:
    # Which layers go is known only when they are ranked, and laco has nothing to merge layer 0 into.
    seed = next(s for s in range(99) if layer_surgery.score(model, scorer="random", seed=s).removal_order[0] == 0)
    report = sweep(target_layers=4, method=["laco", "remove"], scorer="random", seed=seed)
    laco, remove = (point_of(report, method=method) for method in ("laco", "remove"))
    assert laco.status == "failed" and "layer 0 is removed" in str(laco.error)
    assert remove.status == "done" and remove.layers == [0]


def test_a_file_that_cannot_be_written_leaves_the_last_one_whole(
    run: CommandLine, command: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    command += ["--method", "remove", "--scorer", "last"]
    assert run(*command, "--target-layers", 4).code == 0
    before = listing(tmp_path)
    assert "output/sweep.json" in before

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    outcome = run(*command, "--target-layers", 3)
    assert outcome.code == 1
    assert outcome.error_lines[-1] == (
        f"error: writing to --output {output} failed (No space left on device); nothing half-written is left."
    )
    assert listing(tmp_path) == before


# Bad input


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"--method": "fisher,svdd"}, "unknown method 'svdd'. Did you mean 'svd'?"),
        ({"--scorer": "fishr"}, "unknown scorer 'fishr'. Did you mean 'fisher'?"),
        ({"--target-layers": "4,5"}, "--target-layers is 5; allowed: 1 to 4"),
        ({"--target-layers": "4,x"}, "'4,x' is not a list of numbers of layers"),
        ({"--target-layers": ","}, "--target-layers is empty"),
        ({"--keep": "0.1,1.5"}, "--keep is 1.5; allowed: a fraction"),
        ({"--keep": "0.1,nan"}, "--keep is nan; allowed: a fraction"),
        ({"--keep": "2", "--method": "remove"}, "--keep is 2.0; allowed: a fraction"),
        ({"--keep": "0.0001"}, "cannot be reached by cutting channels, singular"),
        ({"--scorer": "angular", "--remove": "mlp"}, "--scorer angular ranks whole layers"),
        ({"--best": "perplexity"}, "--best is 'perplexity'; give a quantity and a bound"),
        ({"--best": "perplexity<=1.1y"}, "--best is 'perplexity<=1.1y'; give a quantity and a bound"),
        ({"--best": "perplexty<=2"}, "'perplexty' is no quantity to bound. Did you mean 'perplexity'?"),
        ({"--best": "perplexity>=2x"}, "a good perplexity is bounded with <="),
        ({"--best": "top1_agreement<=0.9"}, "a good top1_agreement is bounded with >="),
        ({"--best": "kl_divergence<=0.9x"}, "leave out the x"),
        ({"--best": "perplexity<=1e999"}, "give a finite number"),
        ({"--best": "kl_divergence<=1", "--no-distance": None}, "is not measured with --no-distance"),
        ({"--best": "perplexity<=1x", "--no-eval": None}, "is not measured with --no-eval"),
        ({"--refit": None, "--samples": "3"}, "--refit needs at least 4 calibration sequences"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_mistake_is_one_sentence_before_any_work(
    run: CommandLine, command: list[Any], tmp_path: Path, arguments: dict[str, str | None], sentence: str
) -> None:
    given = {"--target-layers": 3} | dict(zip(command[2::2], command[3::2], strict=True)) | arguments
    if "--no-eval" in arguments:
        given.pop("--eval-data")
    outcome = run(*command[:2], *(part for pair in given.items() for part in pair if part is not None))
    assert outcome.code == 2, outcome.err
    assert outcome.error_lines[-1].startswith("error: ") and sentence in outcome.error_lines[-1]
    assert not any(line.startswith("point") for line in outcome.error_lines)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_a_sweeps_is_refused(run: CommandLine, model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("")
    for output, sentence in ((foreign, "holds thesis.tex and no sweep.json"), (file, "is a file or a link")):
        for more in ([], ["--overwrite"]):
            before = listing(tmp_path)
            outcome = run("sweep", model, "--target-layers", "3", "--output", output, *more)
            assert outcome.code == 2 and sentence in outcome.err
            assert listing(tmp_path) == before


def test_a_directory_that_cannot_be_made_is_refused(run: CommandLine, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "below", Path("/proc/sweep")):
        outcome = run("sweep", model, "--target-layers", "3", "--output", output)
        assert outcome.code == 2
        assert outcome.error_lines[-1].startswith(f"error: --output {output} cannot be written (")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_sweeps_in_one_directory_are_not_let_in_together(
    run: CommandLine, command: list[Any], tmp_path: Path
) -> None:
    command += ["--method", "remove", "--scorer", "last", "--target-layers", 3]
    with sweep_directory(tmp_path / "output"):
        outcome = run(*command)
        assert outcome.code == 2
        assert outcome.error_lines[-1].startswith(f"error: another run is working on --output {tmp_path / 'output'};")
    assert run(*command).code == 0
    assert not list((tmp_path / "output").glob(".*"))


def test_what_a_killed_run_has_left_is_no_obstacle(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "output" / ".layer-surgery-killed").mkdir(parents=True)
    (tmp_path / "output" / ".sweep.json.partial-123").write_text("{")
    assert sweep(target_layers=3, method="remove").points[0].status == "done"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_text(path.read_text()[:-300]), "is damaged"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is damaged"),
        (lambda path: path.write_text("[]"), "it is not an object"),
        (lambda path: path.write_text("[" * 100_000), "is damaged"),
        (lambda path: edit_json(path, points=None), "damaged at 'points'"),
        (lambda path: edit_json(path, points=[{}]), "damaged at 'points.0.target_layers'"),
        (lambda path: edit_json(path, identity=[1]), "damaged at 'identity'"),
        (lambda path: edit_json(path, schema_version=3), "has schema version 3, and this release reads up to 2"),
        (lambda path: edit_json(path, evaluation=[]), "differ in length"),
        (lambda path: edit_json(path, evaluation=[{}]), "evaluation has a text without a name"),
        (lambda path: edit_json(path, identity={}), "differ in length"),
    ],
)
def test_a_damaged_or_newer_file_is_one_sentence(
    run: CommandLine, swept: Swept, command: list[Any], tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "sweep.json").write_bytes((swept[0] / "sweep.json").read_bytes())
    damage(output / "sweep.json")
    before = listing(output)
    command += [*REMOVE_TWO, "--scorer", "last"]
    outcome = run(*command)
    assert outcome.code == 2 and sentence in outcome.error_lines[-1], outcome.err
    assert listing(output) == before
    assert run(*command, "--overwrite").code == 0


# The best


def test_the_best_is_saved_as_compress_saves_it(
    sweep: Sweep, model: Path, options: Options, tmp_path: Path, measured: list[str]
) -> None:
    output = tmp_path / "output"
    grid = {"target_layers": [4, 3], "keep": [0, 0.3], "method": "fisher", "scorer": "fisher"}
    report = sweep(**grid)
    ratios = sorted(point.perplexity_ratio or 0.0 for point in report.points)
    condition = f"perplexity<={(ratios[1] + ratios[2]) / 2}x"
    del measured[:]
    report = sweep(best=condition, **grid)
    assert measured == ["before", "after"]  # of the model that is saved; no point again
    assert report.best is not None and report.best.point is not None and report.best.output == "best"
    good = [p for p in report.points if (p.perplexity_ratio or 0.0) in ratios[:2]]
    point = min(good, key=lambda p: p.parameters or 0)
    assert report.best.point == point.settings and report.best.value == point.perplexity_ratio
    settings = {name: getattr(point, name) for name in ("target_layers", "keep", "method", "scorer")}
    alone = layer_surgery.compress(model, tmp_path / "alone", **settings, **options)
    saved = strict_json((output / "best" / "surgery.json").read_text(encoding="utf-8"))
    assert saved["plan"] == alone.plan.to_dict()
    assert saved["after"] == strict_json(json.dumps(alone.to_dict()["after"]))
    assert saved["scores"]["removal_order"] == alone.scores.removal_order if alone.scores else False
    tensors, expected = tensors_of(output / "best"), tensors_of(tmp_path / "alone")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    del measured[:]
    sweep(best=condition, **grid)
    assert measured == []  # it is there already


def test_a_best_that_new_points_beat_is_forgotten(sweep: Sweep, tmp_path: Path) -> None:
    first = sweep(method="remove", target_layers=3, best="perplexity<=1000x")
    assert first.best is not None
    larger = sweep(method="remove", target_layers=4)
    assert larger.best == first.best  # the smallest still
    smaller = sweep(method="remove", target_layers=2)
    assert smaller.best is None
    assert strict_json((tmp_path / "output" / "sweep.json").read_text(encoding="utf-8"))["best"] is None
    assert "smallest" not in (tmp_path / "output" / "sweep.md").read_text(encoding="utf-8")


def test_the_best_of_a_sweep_is_not_replaced_while_it_is_the_model(
    run: CommandLine, sweep: Sweep, command: list[Any], tmp_path: Path
) -> None:
    sweep(target_layers=4, method="remove", best="perplexity<=1000x")
    before = listing(tmp_path)
    command[1] = tmp_path / "output" / "best"
    outcome = run(*command, *REMOVE_TWO, "--scorer", "last", "--overwrite")
    assert outcome.code == 2 and "is the model itself" in outcome.error_lines[-1]
    assert listing(tmp_path) == before


def test_where_none_satisfies_the_nearest_is_named(run: CommandLine, swept: Swept, command: list[Any]) -> None:
    command = [*command[:-1], swept[0], "--target-layers", "4,3", "--method", "remove", "--eval-windows", 6]
    outcome = run(*command, "--best", "perplexity<=0.5x")
    assert outcome.code == 1
    nearest = min(swept[1].points, key=lambda point: point.perplexity_ratio or 0.0)
    assert f"no point satisfies perplexity<=0.5x; the nearest is {nearest.settings.name}" in outcome.error_lines[-1]
    assert not (swept[0] / "best").exists()


# What is written and printed


def test_the_file_on_disk_is_the_report(swept: Swept) -> None:
    output, report = swept
    stored = read_sweep(output, "give another")
    assert stored is not None and stored.points == report.points and stored.original == report.original


def test_the_csv_has_a_line_for_each_point(swept: Swept, text: Path) -> None:
    output, report = swept
    with (output / "sweep.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.points)
    for row, point in zip(rows, report.points, strict=True):
        assert point.result is not None and point.comparison is not None
        assert int(row["parameters"]) == point.parameters
        assert float(row[f"perplexity: {text}"]) == point.result.perplexity[str(text)].value
        assert float(row[f"ratio high: {text}"]) == point.comparison.perplexity[str(text)].ratio.high
        assert float(row[f"kl_divergence: {text}"]) == point.comparison.kl_divergence[str(text)].mean
        assert row["front_parameters"] == str("parameters" in point.fronts)
        assert [int(index) for index in row["layers"].split()] == point.layers


def test_json_is_the_file_and_nothing_else(run: CommandLine, swept: Swept, command: list[Any]) -> None:
    command = [*command[:-1], swept[0], *REMOVE_TWO, "--eval-windows", 6]
    outcome = run(*command, "--json")
    assert outcome.code == 0
    assert strict_json(outcome.out) == strict_json((swept[0] / "sweep.json").read_text(encoding="utf-8"))
    table = run(*command).out
    assert table.count("remove") >= 4 and "front:" in table
    assert max(map(len, table.splitlines())) > 80  # no number is broken on a narrow terminal


def test_speed_and_tasks_are_measured_beside_the_original(sweep: Sweep, tmp_path: Path) -> None:
    grid = {"target_layers": [4, 2], "method": "remove"}
    more = {"speed": True, "speed_lengths": [8], "speed_new_tokens": 3, "speed_repeats": 1}
    report = sweep(**grid, **more, tasks="bundled_agreement", limit=4)
    assert report.original is not None and report.original.tasks
    for point in report.points:
        assert point.result is not None and point.comparison is not None
        [after], [before] = point.result.speed, point.original_speed
        assert point.decode_speed == after.decode_tokens_per_second / before.decode_tokens_per_second
        assert point.prefill_speed == after.prefill_tokens_per_second / before.prefill_tokens_per_second
        assert point.comparison.tasks.keys() == point.result.tasks.keys() == report.original.tasks.keys()
    table = (tmp_path / "output" / "sweep.md").read_text(encoding="utf-8")
    assert all(title in table for title in (" decoding ", " prefill ", "bundled_agreement"))
    with pytest.raises(UserError, match=r"--tasks was .*; --speed was"):
        sweep(**grid)


def test_a_model_in_memory_is_the_same_as_its_files(
    sweep: Sweep, model: Path, options: Options, tmp_path: Path, measured: list[str]
) -> None:
    grid: Options = {"target_layers": 3, "method": "svd", "scorer": "last"}
    sweep(**grid)
    count = len(measured)
    in_memory, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    layer_surgery.sweep(in_memory, tmp_path / "output", tokenizer=tokenizer, **grid, **options)
    assert len(measured) == count


def test_what_is_kept_of_a_point_is_freed_before_the_next(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    open_stores: set[int] = set()
    at_begin: list[tuple[int, int]] = []
    begin, close, measure = BoundaryStore.__init__, BoundaryStore.close, Measuring.point

    def opened(self: BoundaryStore, *arguments: Any, **keywords: Any) -> None:
        open_stores.add(id(self))
        begin(self, *arguments, **keywords)

    def closed(self: BoundaryStore) -> None:
        open_stores.discard(id(self))
        close(self)

    def watched(self: Measuring, *arguments: Any) -> SweepPoint:
        at_begin.append((len(open_stores), len(list(self.bench.session.scratch.iterdir()))))
        return measure(self, *arguments)

    monkeypatch.setattr(BoundaryStore, "__init__", opened)
    monkeypatch.setattr(BoundaryStore, "close", closed)
    monkeypatch.setattr(Measuring, "point", watched)
    report = sweep(target_layers=[4, 3, 2], method="svd")
    assert {point.status for point in report.points} == {"done"}
    assert len(at_begin) == 3 and len(set(at_begin)) == 1
    assert not open_stores


# Page


def test_the_page_has_a_row_for_every_point_and_can_be_made_again(
    run: CommandLine, swept: Swept, tmp_path: Path
) -> None:
    output, report = swept
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count('<th scope="row">') == 2 * len(report.points)  # results, and their layers
    for point in report.points:
        assert f"{point.parameters:,}" in page
        assert point.comparison is not None
        [ratio] = [change.ratio for change in point.comparison.perplexity.values()]
        assert f"x {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]" in page
    (tmp_path / "sweep.json").write_bytes((output / "sweep.json").read_bytes())
    assert run("report", tmp_path).code == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_a_sweep_may_stand_beside_a_result(
    run: CommandLine, swept: Swept, model: Path, options: Options, tmp_path: Path
) -> None:
    layer_surgery.compress(model, tmp_path / "one", target_layers=3, keep=0, scorer="last", refit=False, **options)
    outcome = run("report", tmp_path / "one", swept[0], "--output", tmp_path / "both.html")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert page.count('<th scope="row">') == 2 * (len(swept[1].points) + 1)
    assert "were not all made from the same original" not in page


def test_failed_points_are_not_on_the_page(swept: Swept) -> None:
    first, *others = swept[1].points
    report = replace(swept[1], points=[replace(first, status="failed", error="it broke"), *others])
    assert len(list(sweep_rows(report))) == len(others)


def test_a_damaged_sweep_is_refused_by_report(run: CommandLine, swept: Swept, tmp_path: Path) -> None:
    whole = (swept[0] / "sweep.json").read_bytes()
    (tmp_path / "sweep.json").write_bytes(whole[:500])
    outcomes = [run("report", tmp_path)]
    (tmp_path / "sweep.json").write_bytes(whole)
    outcomes.append(run("report", tmp_path, "--base-model", "a/b"))
    edit_json(tmp_path / "sweep.json", provenance={"packages": ["torch"]})
    outcomes.append(run("report", tmp_path))
    sentences = ("sweep.json is damaged: it is not JSON", "holds a sweep; leave it out", "contradicts itself")
    for outcome, sentence in zip(outcomes, sentences, strict=True):
        assert outcome.code == 2 and sentence in outcome.error_lines[-1]
    assert not (tmp_path / "report.html").exists()
