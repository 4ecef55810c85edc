"""How a run speaks to its user, and how long its stages take."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""`with progress("what", total) as advance: ... advance()`."""


def no_progress(_what: str, _total: int) -> AbstractContextManager[Callable[[], None]]:
    """Show nothing."""
    return nullcontext(lambda: None)


@dataclass(frozen=True)
class Stage:
    """A stage of a run, as its user is told of it."""

    name: str
    title: str  #: What is done in it, for people.
    _: KW_ONLY
    kind: str = ""  #: Stages of one kind take about as long as each other; "": it is like no other.
    work: float | None = None
    """Its work, in a unit that all stages of the run have: 0 if that is little, None if it is not known."""
    steps: tuple[str, ...] = ()
    """The steps that do this work, as `Progress` names them, where the stage also does what is not counted in it."""


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Progress bars, stages and notes of a run. The default shows nothing."""

    progress: Progress = no_progress
    note: Callable[[str], None] = lambda _text: None
    plan: Callable[[Sequence[Stage]], None] = lambda _stages: None
    """Called with the stages that follow, once they are known."""
    stage: Callable[[str], AbstractContextManager[None]] = lambda _name: nullcontext()
    """`with stage("score"): ...` around each stage, by its name. Stages that were not announced are parts of others."""


@dataclass
class Clock:
    """Seconds spent in each stage; a stage that is entered twice adds up."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def rounded(self) -> dict[str, float]:
        """Seconds of each stage, to the millisecond."""
        return {name: round(value, 3) for name, value in self.seconds.items()}
