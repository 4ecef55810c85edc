"""Where a run is, shown on stderr: bars on a terminal; elsewhere a line a stage, and one now and then in a long one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from layer_surgery.progress import Stage, Ui
from layer_surgery.reporting.text import one_line

#: Seconds between two lines of a stage, at least, where there are no bars.
HEARTBEAT = 30.0


@dataclass
class Step:
    """Something countable within a stage, such as a walk through the layers."""

    what: str
    total: int
    began: float
    done: int = 0

    def left(self, now: float) -> float | None:
        """Return about how many seconds it will take yet; None before the first is done."""
        return (now - self.began) / self.done * (self.total - self.done) if self.done else None


class Course:
    """Which stage of how many a run is in, since when it runs, and about how long it will take yet."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Begin now; `now` tells the time in seconds."""
        self.now, self._began = now, now()
        self._stages: list[Stage] = []
        self._seconds: dict[str, float] = {}
        self._worked: dict[str, float] = {}  # those of them that went into the work that is counted
        self._entered = self._began
        self.current: Stage | None = None
        self.steps: list[Step] = []  #: Under way, the outermost first.

    def plan(self, stages: Sequence[Stage]) -> None:
        """Take the stages that follow, in their order; what was known of others is forgotten."""
        self._stages, self._seconds, self._worked, self.current = list(stages), {}, {}, None

    @contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """Enter a stage, and yield whether it is one of the plan; another is a part of the stage under way."""
        found = next((stage for stage in self._stages if stage.name == name), None)
        if found is None or self.current is not None:
            yield False
            return
        self.current, self._entered = found, self.now()
        try:
            yield True
        finally:
            self._seconds[name] = self.now() - self._entered
            if not found.steps:
                self._worked[name] = self._seconds[name]
            self.current = None

    @contextmanager
    def step(self, what: str, total: int) -> Iterator[Step]:
        """Enter a step of so many parts; the caller counts them."""
        step = Step(what, total, self.now())
        self.steps.append(step)
        try:
            yield step
        finally:
            self.steps.remove(step)
            if self.current is not None and what in self.current.steps:
                name = self.current.name
                self._worked[name] = self._worked.get(name, 0.0) + self.now() - step.began

    @property
    def title(self) -> str:
        """The stage and, where there are several, its place among them."""
        if self.current is None:
            return "preparing"
        if len(self._stages) == 1:
            return self.current.title
        return f"stage {self._stages.index(self.current) + 1} of {len(self._stages)}: {self.current.title}"

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning of the run."""
        return self.now() - self._began

    @property
    def left(self) -> float | None:
        """About how many seconds the run will take yet; None where that cannot be known yet."""
        if self.current is None:
            return None
        rest = [self._expected(stage) for stage in self._stages[self._stages.index(self.current) + 1 :]]
        expected = self._expected(self.current)
        if expected is None or None in rest:
            return None
        within = max(expected - (self.now() - self._entered), self.left_of_step or 0.0)
        return within + sum(seconds or 0.0 for seconds in rest)

    @property
    def left_of_step(self) -> float | None:
        """About how many seconds the longest step that is under way will take yet."""
        known = [left for step in list(self.steps) if (left := step.left(self.now())) is not None]
        return max(known, default=None)

    @property
    def times(self) -> str:
        """Time that has passed, and about how much is left."""
        left, of_step = self.left, self.left_of_step
        if left is not None:
            return f"{minutes(self.elapsed)}, about {minutes(left)} left"
        return minutes(self.elapsed) + (f", about {minutes(of_step)} left in this step" if of_step is not None else "")

    def _expected(self, stage: Stage) -> float | None:
        """Return how long a stage should take: as those of its kind took, else by its work; None: not known."""
        done = [each for each in self._stages if each.name in self._seconds]
        alike = [self._seconds[each.name] for each in done if stage.kind and each.kind == stage.kind]
        if alike:
            return sum(alike) / len(alike)
        if not stage.work:
            return stage.work
        worked = [(self._worked[each.name], each.work) for each in done if each.work and each.name in self._worked]
        return stage.work * sum(seconds for seconds, _ in worked) / sum(work for _, work in worked) if worked else None


def minutes(seconds: float) -> str:
    """Return seconds as `0:41` or `2:03:10`."""
    whole = max(round(seconds), 0)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


@contextmanager
def progress_ui(console: Console, now: Callable[[], float] = time.monotonic) -> Iterator[Ui]:
    """Yield what shows a run on a console: bars on a terminal that can move its cursor, else lines.

    `now` tells the time in seconds.
    """
    shown = _bars if console.is_interactive else _lines
    with shown(console, Course(now)) as ui:
        yield ui


@contextmanager
def _lines(console: Console, course: Course) -> Iterator[Ui]:
    """Print a line for each stage, and in a long one another every `HEARTBEAT` seconds, when a part of it is done."""
    last = course.now()

    def say(text: str) -> None:
        nonlocal last
        last = course.now()
        console.print(one_line(text), style="dim", markup=False)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with course.stage(name) as planned:
            if planned:
                say(course.title)
            yield

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
        with course.step(what, total) as step:

            def advance() -> None:
                step.done += 1
                if course.now() - last >= HEARTBEAT:
                    outer = course.steps[0]
                    where = course.current.title if course.current is not None else course.title
                    say(f"{where}: {outer.what} {outer.done} of {outer.total}, {course.times}")

            yield advance

    yield Ui(progress=progress, note=say, plan=course.plan, stage=stage)


class _State(ProgressColumn):
    """Behind the bar of the run: the times; behind that of a step: how many parts are done."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self._course = course

    def render(self, task: Task) -> Text:
        whole = task.fields.get("whole", False)
        return Text(self._course.times if whole else f"{task.completed:.0f}/{task.total:.0f}", no_wrap=True)


@contextmanager
def _bars(console: Console, course: Course) -> Iterator[Ui]:
    """Show a bar for the run, with its stage and times, and one for each step that is under way."""
    bars = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), _State(course), console=console, transient=True
    )
    run = bars.add_task(course.title, total=None, whole=True)

    def show_run() -> None:
        bars.update(run, description=course.title)
        left, elapsed = course.left, course.elapsed
        if left is not None:
            bars.update(run, total=elapsed + left, completed=elapsed)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with course.stage(name) as planned:
            if planned:
                show_run()
                bars.refresh()
            yield

    @contextmanager
    def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
        task = bars.add_task(f"  {what}", total=total)
        with course.step(what, total) as step:

            def advance() -> None:
                step.done += 1
                bars.advance(task)
                show_run()

            try:
                yield advance
            finally:
                bars.remove_task(task)

    with bars:
        yield Ui(
            progress=progress,
            note=lambda text: console.print(one_line(text), style="dim", markup=False),
            plan=course.plan,
            stage=stage,
        )
