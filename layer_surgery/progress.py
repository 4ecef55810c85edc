"""How a run speaks to its user, and how long its stages take."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""`with progress("what", total) as advance: ... advance()`."""


def no_progress(_what: str, _total: int) -> AbstractContextManager[Callable[[], None]]:
    """Show nothing."""
    return nullcontext(lambda: None)


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Progress bars and notes of a run. The default shows nothing."""

    progress: Progress = no_progress
    note: Callable[[str], None] = lambda _text: None


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
