"""Values that the shell completes, from the declarations in `layer_surgery.config` alone: nothing slow is imported."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import click
from click.shell_completion import CompletionItem, get_completion_class
from click.types import StringParamType

from layer_surgery.config.choices import Choice
from layer_surgery.config.declaring import About

Paths = Literal["file", "dir"]
#: Parts of metavars that stand for paths, and what the shell completes for them.
_PATHS: dict[str, Paths] = {"FILE": "file", "DIR": "dir"}


class Completed(StringParamType):
    """A text of which the shell completes some values. What is allowed is checked where the value is used."""

    def __init__(
        self, choices: Mapping[str, Choice] | Collection[str] = (), *, several: bool = False, paths: Paths | None = None
    ) -> None:
        """Complete one of the `choices`, or each of `several` between commas, and paths."""
        self._choices, self._several, self._paths = choices, several, paths

    @classmethod
    def of(cls, about: About) -> Completed:
        """Return the type of an option's value."""
        return cls(about.choices, several=about.form == "list", paths=_paths(about))

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        given, comma, last = incomplete.rpartition(",") if self._several else ("", "", incomplete)
        found = [
            CompletionItem(f"{given}{comma}{name}", help=_summary(self._choices, name))
            for name in self._choices
            if name.startswith(last) and name not in given.split(",")
        ]
        # bash offers either words or paths: paths where no name fits.
        return found or ([CompletionItem(incomplete, type=self._paths)] if self._paths else [])


class CompletedPath(click.Path):
    """A path; the shell completes directories where a directory is asked for."""

    def __init__(self, about: About) -> None:
        super().__init__(path_type=Path)
        self._paths = _paths(about) or "file"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type=self._paths)]


def completion_script(program: click.Context, shell: str) -> str:
    """Return what a shell is to run to complete for a program; `shell` is bash, zsh or fish."""
    name = program.info_name or ""
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(program.command, {}, name, f"_{name}_complete".replace("-", "_").upper()).source()


def _paths(about: About) -> Paths | None:
    return next((kind for name, kind in _PATHS.items() if name in (about.metavar or "")), None)


def _summary(choices: Mapping[str, Choice] | Collection[str], name: str) -> str | None:
    return choices[name].summary if isinstance(choices, Mapping) else None
