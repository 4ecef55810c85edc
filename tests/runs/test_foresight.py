"""What a run will take, said before it: nothing is run, totals add up, what cannot fit is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from large_sizes import llama_7b
from tiny_checkpoints import CommandLine, listing, saved_model, strict_json

import layer_surgery
from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.errors import UserError
from layer_surgery.records.foresight import Foresight, StageForesight
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.foresight import memory
from layer_surgery.runs.foresight.fits import check_memory
from layer_surgery.runs.foresight.sizes import Sizes

GB = 10**9


@pytest.fixture
def options(text: Path) -> dict[str, Any]:
    data = {"calibration": str(text), "eval_data": str(text)}
    return {**data, "samples": 8, "sequence_length": 16, "batch_size": 2, "layers": [1, 2], "continuations": 0}


def test_nothing_is_run_or_written(
    model: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run has begun the work")

    monkeypatch.setattr(Evaluator, "measure", forbidden)
    monkeypatch.setattr(StatisticsSource, "get", forbidden)
    found = layer_surgery.foresee(model, tmp_path / "output", **options)
    assert [stage.name for stage in found.stages] == ["evaluate_before", "operate", "refit", "evaluate_after", "save"]
    assert all(stage.seconds is not None and stage.seconds > 0 for stage in found.stages)
    assert all(sum(stage.parts.values()) == stage.memory_bytes for stage in found.stages)
    assert found.memory_bytes == max(stage.memory_bytes for stage in found.stages)
    assert listing(tmp_path) == {}


def test_the_size_of_the_result_is_what_the_run_writes(model: Path, options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"method": "svd", "keep": 0.3, "refit": False, "eval_data": None}
    found = layer_surgery.foresee(model, tmp_path / "output", **options)
    report = layer_surgery.compress(model, tmp_path / "output", **options)
    itemsize = report.after.size_bytes // report.after.parameters
    # Ranks are whole numbers: what the budget leaves over is less than one rank of the widest linear.
    assert report.after.size_bytes <= found.output_bytes <= 1.1 * report.after.size_bytes
    assert itemsize in (2, 4)


def test_the_command_prints_a_table_or_json(run: CommandLine, model: Path, text: Path) -> None:
    arguments = ["compress", model, "--target-layers", 2, "--calibration", text, "--samples", 8, "--eval-data", text]
    arguments += ["--sequence-length", 16, "--batch-size", 2, "--dry-run", "--tasks", "bundled"]
    table = run(*arguments)
    assert table.code == 0
    for title in ("evaluating the original", "ranking the layers (fisher)", "refitting", "in all", "disk:"):
        assert title in table.out
    assert "not in the times: tasks" in table.out
    record = strict_json(run(*arguments, "--json").out)
    assert record["memory_bytes"] == max(stage["memory_bytes"] for stage in record["stages"])
    assert record["probed"]["forward"] > 0


def test_a_sweep_is_foreseen_point_by_point_and_leaves_out_what_it_has(
    run: CommandLine, model: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["sweep", model, "--target-layers", "3,2", "--keep", "0,0.5", "--output", tmp_path / "sweep"]
    arguments += ["--calibration", text, "--eval-data", text, "--samples", 8, "--sequence-length", 16]
    arguments += ["--batch-size", 2, "--method", "fisher", "--no-refit", "--continuations", 0]
    before = listing(tmp_path)
    found = strict_json(run(*arguments, "--dry-run", "--json").out)
    points = ["3 layers", "2 layers"]
    names = [stage["name"] for stage in found["stages"]]
    assert names[:2] == ["evaluate_before", "statistics"]
    assert len(names) == 2 + 4
    assert all(any(point in name for name in names) for point in points)
    assert all(stage["seconds"] > 0 for stage in found["stages"])
    assert listing(tmp_path) == before
    run(*[each if each != "3,2" else "3" for each in arguments])
    assert (tmp_path / "sweep" / "sweep.json").exists()
    before = listing(tmp_path)
    rest = strict_json(run(*arguments, "--dry-run", "--json").out)
    assert [stage["name"] for stage in rest["stages"]] == [*names[:2], *(name for name in names if "2 layers" in name)]
    assert listing(tmp_path) == before
    outcome = run(*arguments, "--dry-run", "--memory-limit", "50MB")
    assert outcome.code == 2
    assert "--memory-limit (or what is free) is 50,000,000" in outcome.err


def test_a_scorer_that_searches_has_no_time(model: Path, options: dict[str, Any]) -> None:
    del options["layers"]
    found = layer_surgery.foresee(model, target_layers=2, scorer="perplexity", refit=False, **options)
    assert next(stage for stage in found.stages if stage.name == "score").seconds is None
    assert any("perplexity" in each for each in found.left_out)


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_other_layers_have_a_foresight_too(family: str, tmp_path: Path, options: dict[str, Any]) -> None:
    options |= {"layers": [1], "keep": 0.5}
    found = layer_surgery.foresee(saved_model(tmp_path / family, family), **options)
    assert found.seconds > 0


def test_too_small_a_disk_is_refused(
    model: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int = 100

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage())
    with pytest.raises(UserError, match=r"scratch files and the result would take up to [\d,]+ bytes.* has 100 free"):
        layer_surgery.foresee(model, tmp_path / "output", **options)


def test_a_memory_limit_below_what_the_process_has_is_refused(model: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--memory-limit \(or what is free\) is 50,000,000.*raise --memory-limit"):
        layer_surgery.foresee(model, memory_limit=50_000_000, **options)


def foreseen(sizes: Sizes) -> list[StageForesight]:
    return [
        StageForesight(name=name, title=name, seconds=None, memory_bytes=sum(parts.values()), parts=parts)
        for name, parts in (("operate", memory.statistics(sizes)), ("refit", memory.refit(sizes)))
    ]


def record(stages: list[StageForesight], available: int) -> Foresight:
    disk = {"output_bytes": 0, "output_free_bytes": 0, "scratch_bytes": 0, "scratch_free_bytes": 0}
    return Foresight(model="m", device="cpu", dtype="float32", stages=stages, memory_available_bytes=available, **disk)


@pytest.mark.parametrize(
    ("settings", "less", "option"),
    [
        ({"decomposition": "exact"}, {"decomposition": "leading"}, "--decomposition leading"),
        ({"batch_size": 512, "calibration": 512}, {"batch_size": 64}, "--batch-size 64"),
        ({"batch_size": 64, "length": 2048}, {"dtype": torch.bfloat16}, "--dtype bfloat16"),
        ({"boundary_bytes": 40 * GB, "calibration": 4096}, {"boundary_bytes": 3 * GB}, "--memory-limit"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_option_that_makes_it_fit(
    settings: dict[str, Any], less: dict[str, Any], option: str
) -> None:
    sizes = llama_7b(**settings)
    stages, fitting = foreseen(sizes), foreseen(sizes.with_(**less))
    available = max(stage.memory_bytes for stage in fitting) + (2 * GB if option == "--memory-limit" else 0)
    if option == "--memory-limit":
        available = max(available, 12 * GB)
    assert max(stage.memory_bytes for stage in stages) > available
    with pytest.raises(UserError, match=re.escape(option)):
        check_memory(record(stages, available), sizes, available, foreseen)
    check_memory(record(fitting, available), sizes, available, foreseen)


def test_boundaries_beyond_their_share_of_memory_are_on_disk() -> None:
    sizes = llama_7b(boundary_bytes=int(2.5 * 128 * 256 * 4096 * 4))
    slot = sizes.slot_bytes(128, 256)
    assert slot == 128 * 256 * 4096 * 4
    assert sizes.boundaries(3, 128, 256) == (2 * slot, slot)
    assert memory.boundary_files_bytes(sizes) == slot


def test_moments_are_those_of_every_input_once_and_of_every_output() -> None:
    inputs = 3 * 4096**2 + 11008**2
    outputs = 5 * 4096**2 + 2 * 11008**2
    assert llama_7b().layers[0].moment_elements == inputs + outputs
