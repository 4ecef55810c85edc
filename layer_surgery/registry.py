"""Named functions with their sources: scorers and surgical methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from layer_surgery.errors import UserError, unknown_name

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function."""

    name: str
    function: F
    summary: str
    """One line for help texts."""
    source: str
    """URL of the paper, or "" where there is none."""
    needs_data: bool
    """Whether the function looks at calibration data."""
    needs_boundaries: bool
    """Whether the function reads the hidden states at all layer boundaries."""
    removes: bool = False
    """Methods: whether the layers are removed and nothing of them is kept, so that there is no budget to spend."""
    parts: bool = False
    """Scorers: whether the attention and the MLP of layers can be ranked too."""
    refits: bool = False
    """Methods: whether a refit follows unless the user says otherwise."""
    depends_on: tuple[str, ...] = ()
    """Scorers: the fields of the context, apart from model, data and seed, that what it returns depends on. Where
    these are the same, one ranking serves several compressions."""


class Registry(Generic[F]):
    """Functions by name. Names are unique; an unknown one is answered with the nearest."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, Entry[F]] = {}

    def add(
        self,
        name: str,
        *,
        summary: str,
        source: str = "",
        needs_data: bool = False,
        needs_boundaries: bool = False,
        removes: bool = False,
        parts: bool = False,
        refits: bool = False,
        depends_on: tuple[str, ...] = (),
    ) -> Callable[[F], F]:
        """Return a decorator that registers a function under `name`; see `Entry`."""
        if name in self._entries:
            raise ValueError(f"{self._kind} '{name}' is registered already")

        def register(function: F) -> F:
            self._entries[name] = Entry(
                name,
                function,
                summary,
                source,
                needs_data or needs_boundaries,
                needs_boundaries,
                removes,
                parts,
                refits,
                depends_on,
            )
            return function

        return register

    def __getitem__(self, name: str) -> Entry[F]:
        if name not in self._entries:
            raise UserError(unknown_name(self._kind, name, self._entries))
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry[F]]:
        return iter(self._entries.values())

    @property
    def names(self) -> list[str]:
        return list(self._entries)
