"""Functions that are chosen by name: scorers, surgical methods and kinds of components."""

from collections.abc import Callable, Container, Iterator
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

    def __init__(
        self, kind: str, entry: Callable[Concatenate[Any, Facts], E], listed: Container[str] | None = None
    ) -> None:
        """Make an empty registry for a `kind` of thing, whose entries are `entry(function, ...)`.

        Only names that are `listed`, for the command line's help, can be registered; None: any.
        """
        self._kind, self._entry, self._listed = kind, entry, listed
        self._entries: dict[str, E] = {}

    def add(self, *args: Facts.args, **facts: Facts.kwargs) -> Callable[[F], F]:
        """Return a decorator that registers a function; the arguments are those of the entry behind the function."""

        def register(function: F) -> F:
            entry = self._entry(function, *args, **facts)
            if entry.name in self._entries:
                raise ValueError(f"{self._kind} '{entry.name}' is registered already")
            if self._listed is not None and entry.name not in self._listed:
                raise ValueError(f"{self._kind} '{entry.name}' is not listed in config/choices.py")
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
