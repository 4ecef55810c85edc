"""Named functions with their sources: scorers and surgical methods."""

from collections.abc import Callable, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

from layer_surgery.errors import UserError, unknown_name


class Entry(Protocol):
    """A registered function with what is known about it."""

    @property
    def name(self) -> str: ...


E = TypeVar("E", bound=Entry)
F = TypeVar("F", bound=Callable[..., Any])
Facts = ParamSpec("Facts")


class Registry(Generic[E, Facts]):
    """Entries by name. Names are unique; an unknown one is answered with the nearest."""

    def __init__(self, kind: str, entry: Callable[Concatenate[Any, Facts], E]) -> None:
        """Make an empty registry for a `kind` of thing, whose entries are `entry(function, ...)`."""
        self._kind, self._entry = kind, entry
        self._entries: dict[str, E] = {}

    def add(self, *args: Facts.args, **facts: Facts.kwargs) -> Callable[[F], F]:
        """Return a decorator that registers a function; the arguments are those of the entry behind the function."""

        def register(function: F) -> F:
            entry = self._entry(function, *args, **facts)
            if entry.name in self._entries:
                raise ValueError(f"{self._kind} '{entry.name}' is registered already")
            self._entries[entry.name] = entry
            return function

        return register

    def __getitem__(self, name: str) -> E:
        if name not in self._entries:
            raise UserError(unknown_name(self._kind, name, self._entries))
        return self._entries[name]

    def __iter__(self) -> Iterator[E]:
        return iter(self._entries.values())

    @property
    def names(self) -> list[str]:
        return list(self._entries)
