"""Where a run is: its stages, and about how long it will take; on a terminal, in lines, and silent."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_checkpoints import CommandLine

import layer_surgery
from layer_surgery.cli.progress import HEARTBEAT, Course, minutes, progress_ui
from layer_surgery.progress import Stage, Ui

STAGES = [
    Stage("before", "evaluating the original", kind="evaluation", work=10),
    Stage("score", "ranking the layers", work=60),
    Stage("after", "evaluating the result", kind="evaluation", work=10),
    Stage("save", "saving", work=0),
]


class FakeTime:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def course(time: FakeTime) -> Course:
    course = Course(time)
    course.plan(STAGES)
    return course


# Estimates


def test_what_is_left_is_known_from_stages_of_a_kind_and_from_work(course: Course, time: FakeTime) -> None:
    with course.stage("before"):
        time.seconds += 5
        assert course.left is None and course.times == "0:05"
    with course.stage("score"):
        # Half a second for each unit of work: 30 s of this stage, and 5 s like the first.
        assert course.title == "stage 2 of 4: ranking the layers"
        assert course.left == 35
        time.seconds += 10
        assert course.left == 25 and course.times == "0:15, about 0:25 left"
        time.seconds += 30  # 10 s longer than it should
        assert course.left == 5
    with course.stage("after"):
        assert course.left == 5
    with course.stage("save"):
        assert course.left == 0


def test_a_step_that_takes_longer_than_the_stage_should_counts(course: Course, time: FakeTime) -> None:
    with course.stage("before"):
        time.seconds += 1
    with course.stage("score"), course.step("forward", 10) as step:
        time.seconds += 5
        step.done = 1
        assert course.left == 45 + 1


def test_unknown_work_leaves_the_rest_of_a_step(course: Course, time: FakeTime) -> None:
    course.plan([Stage("score", "ranking the layers")])
    with course.stage("score"), course.step("forward", 4) as step:
        assert course.times == "0:00"
        time.seconds += 20
        step.done = 1
        assert course.left is None and course.times == "0:20, about 1:00 left in this step"


def test_work_is_done_in_some_steps_of_a_stage(course: Course, time: FakeTime) -> None:
    before, score, *rest = STAGES
    course.plan([replace(before, steps=("forward",)), score, *rest])
    with course.stage("before"):
        for what, seconds in (("forward", 4), ("continuations", 9), ("forward", 1)):
            with course.step(what, 1):
                time.seconds += seconds
    with course.stage("score"):
        assert course.left == 30 + 14  # the result is evaluated as the original was


def test_stages_within_a_stage_are_parts_of_it(course: Course) -> None:
    with course.stage("score") as planned, course.stage("after") as other, course.stage("elsewhere") as unknown:
        assert (planned, other, unknown) == (True, False, False)
        assert course.title.startswith("stage 2 of 4")
    assert course.title == "preparing"


def test_times_are_written_as_minutes() -> None:
    assert [minutes(seconds) for seconds in (0.4, 59.6, 125, 7390)] == ["0:00", "1:00", "2:05", "2:03:10"]


# What is shown


def shown(time: FakeTime, *, terminal: bool) -> str:
    """Return what a run writes whose second stage has twelve layers, ten seconds each."""
    console = Console(
        file=io.StringIO(),
        width=100,
        force_terminal=terminal,
        force_interactive=terminal,
        highlight=False,
        soft_wrap=True,
    )
    with progress_ui(console, time) as ui:
        ui.plan(STAGES)
        with ui.stage("before"):
            time.seconds += 20
        with ui.stage("score"), ui.progress("forward", 12) as advance:
            ui.note("a note")
            for _ in range(12):
                time.seconds += 10
                advance()
        with ui.stage("after"):
            pass
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_say_each_stage_and_every_half_minute_where_it_is(time: FakeTime) -> None:
    assert HEARTBEAT == 30
    assert shown(time, terminal=False).splitlines() == [
        "stage 1 of 4: evaluating the original",
        "stage 2 of 4: ranking the layers",
        "a note",
        "ranking the layers: forward 3 of 12, 0:50, about 1:50 left",
        "ranking the layers: forward 6 of 12, 1:20, about 1:20 left",
        "ranking the layers: forward 9 of 12, 1:50, about 0:50 left",
        "ranking the layers: forward 12 of 12, 2:20, about 0:20 left",
        "stage 3 of 4: evaluating the result",
    ]


def test_a_terminal_has_bars_with_the_stage_and_the_times(time: FakeTime) -> None:
    text = shown(time, terminal=True)
    assert "stage 2 of 4: ranking the layers" in text and "forward" in text and "a note" in text
    assert "0/12" in text and "stage 3 of 4: evaluating the result" in text and "2:20, about 0:20 left" in text


def test_no_notes_or_progress_with_quiet(run: CommandLine, model: Path, text: Path) -> None:
    arguments = ["evaluate", model, "--eval-data", text, "--sequence-length", 16]
    loud, quiet = run(*arguments), run(*arguments, "--quiet")
    assert "evaluating the model" in loud.error_lines
    assert (quiet.code, quiet.err) == (0, "") and quiet.out == loud.out
    wrong = run(*arguments, "-q", "--dtype", "int8")
    assert wrong.code == 2 and len(wrong.error_lines) == 1 and wrong.err.startswith("error: --dtype is 'int8'")


# What runs announce


@pytest.fixture
def seen() -> list[str]:
    return []


@pytest.fixture
def ui(seen: list[str]) -> Ui:
    """Keep the stages that are announced, then those that are entered and are no part of another."""
    inside = False

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        nonlocal inside
        outer, inside = inside, True
        if not outer:
            seen.append(name)
        yield
        inside = outer

    def plan(stages: Sequence[Stage]) -> None:
        seen.extend(f"plan: {stage.name}" for stage in stages)

    return Ui(plan=plan, stage=stage)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("compress", {"target_layers": 2}),
        ("compress", {"target_parameters": 0.9, "refit": False, "no_save": True}),
        ("compress", {"layers": [1], "keep": 0, "eval_data": None}),
        ("score", {"scorer": "block_influence"}),
        ("evaluate", {}),
        ("evaluate", {"baseline": "itself"}),
        ("sweep", {"target_layers": (3, 2), "scorer": "last", "method": "svd"}),
    ],
)
def test_the_stages_that_are_announced_are_entered_in_their_order(
    function: str, options: dict[str, Any], ui: Ui, seen: list[str], model: Path, text: Path, tmp_path: Path
) -> None:
    if "baseline" in options:
        options = options | {"baseline": model}
    if function in ("compress", "sweep") and not options.get("no_save"):
        options = options | {"output": tmp_path / "output"}
    if function != "evaluate":
        options = {"calibration": text, "samples": 4} | options
    if function != "score":
        options = {"eval_data": text} | options
    getattr(layer_surgery, function)(model, sequence_length=16, ui=ui, **options)
    planned = [name.removeprefix("plan: ") for name in seen if name.startswith("plan: ")]
    assert planned and seen[len(planned) :] == planned
