"""The parts that a declaration of an option is made of: its description, its checks, its converters.

An option is a field of an `attrs` class: `attrs.field(default=..., converter=..., validator=..., metadata=about(...))`.
The converter's parameter says what users may pass, the field's annotation what the rest of the package gets.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs

from layer_surgery.config.choices import Choice
from layer_surgery.errors import UserError

_ABOUT = "about"
Group = Literal["Model and data", "Budget", "Surgery", "Healing", "Evaluation", "Output", "Runtime", "Other"]
"""Headings under which help texts list options."""
GROUPS: tuple[Group, ...] = (
    "Model and data",
    "Budget",
    "Surgery",
    "Healing",
    "Evaluation",
    "Output",
    "Runtime",
    "Other",
)
Form = Literal["value", "list", "repeat", "size", "switch"]
"""How the command line writes it: one value; several between commas; given several times; bytes, such as 8GB; a pair
of flags `--x/--no-x`. A bool that is no switch is a lone flag."""


@dataclass(frozen=True, kw_only=True)
class About:
    """Description of an option, for help texts and for the command line."""

    help: str
    metavar: str | None = None  #: The value as help texts write it.
    default: str | None = None  #: The default in words, where the value itself does not say it.
    form: Form = "value"
    name: str | None = None  #: Name on the command line, without the dashes, where it is not the field's.
    items: str = ""
    example: str = ""  #: Names of the items of a list, and an example of one, for errors.
    inner: type[Options] | None = None  #: The options behind a flag, which are the option's value.
    choices: Mapping[str, Choice] | Collection[str] = ()  #: Values that help and completion name; there may be others.
    group: Group | None = None  #: Its heading in help texts, where it is not that of the class.
    terminal: bool = True  #: Whether the command line has it too.
    recorded: bool = True  #: Whether it is among the settings in a record's provenance.

    @property
    def values(self) -> str:
        """The value as help texts write it: as declared, else all choices; "" where neither is there."""
        return self.metavar or "|".join(self.choices)

    def option(self, field: str) -> str:
        """Return what the command line calls the option of a field."""
        return f"--{self.name or field.replace('_', '-')}"


def about(help: str, **more: Any) -> dict[str, About]:
    """Return the metadata of a field; see `About`."""
    return {_ABOUT: About(help=help, **more)}


def about_of(field: attrs.Attribute[Any]) -> About:
    """Return the description of a field."""
    description: About = field.metadata[_ABOUT]
    return description


@attrs.frozen(kw_only=True, slots=False)
class Options:
    """Base of the groups. After the checks of single options, `_check` of every group sees them together."""

    GROUP: ClassVar[Group] = "Other"  #: Heading in help texts of the options that a class declares.
    FIRST: ClassVar[tuple[str, ...]] = ()  #: Options that help texts and signatures name first.

    def __attrs_post_init__(self) -> None:
        for group in type(self).__mro__:
            if "_check" in vars(group):
                group._check(self)  # type: ignore[attr-defined]

    def described(self) -> dict[str, Any]:
        """Return the settings as plain JSON, for provenance and identities; those behind a flag as `flag_option`."""
        settings: dict[str, Any] = {}
        for field in attrs.fields(type(self)):
            about, value = about_of(field), getattr(self, field.name)
            if about.inner is not None:
                settings[field.name] = value is not None
                within = value.described() if value is not None else {}
                settings |= {f"{field.name}_{name}": setting for name, setting in within.items()}
            elif about.recorded:
                settings[field.name] = _plain(value)
        return settings


def fields_of(config: type[Options]) -> list[attrs.Attribute[Any]]:
    """Return the fields of an options class in the order in which help texts and signatures have them."""
    fields = list(attrs.fields(config))
    first = [field for name in config.FIRST for field in fields if field.name == name]
    return first + [field for field in fields if field not in first]


def grouped(config: type[Options]) -> dict[Group, list[attrs.Attribute[Any]]]:
    """Return the fields of an options class under the headings that they have in help texts, in their order."""
    fields = [(group_of(config, field), field) for field in fields_of(config)]
    return {
        group: [field for its_group, field in fields if its_group == group]
        for group in GROUPS
        if any(its_group == group for its_group, _ in fields)
    }


def group_of(config: type[Options], field: attrs.Attribute[Any]) -> Group:
    """Return the heading of a field: its own, else that of the class which declares it."""
    declares = (group for group in config.__mro__ if field.name in inspect.get_annotations(group))
    group: Group = about_of(field).group or next(declares).GROUP  # type: ignore[attr-defined]
    return group


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.to_dict() if hasattr(value, "to_dict") else str(value) if isinstance(value, Path) else value


Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def at_least(least: int) -> Validator:
    """Return a check that a number, or every number of a tuple, is `least` or more; None passes."""

    def check(_instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number < least:
                raise UserError(f"{about_of(field).option(field.name)} is {number}; allowed: {least} or more.")

    return check


def one_of(allowed: Collection[str], error: type[UserError] = UserError) -> Validator:
    """Return a check that a value is one of a few words."""

    def check(_instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if value not in allowed:
            option = about_of(field).option(field.name)
            raise error(f"{option} is '{value}'; allowed: {', '.join(allowed)}.")

    return check


# -- converters: what users may pass, and what the package gets ------------------------------------------------------


def names(value: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    """Return one name, or several, or None, as a tuple."""
    return tuple(map(str, _several(value)))


def maybe_names(value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return one name, or several, as a tuple, or None."""
    return None if value is None else names(value)


def paths(value: str | Path | Sequence[str | Path] | None) -> tuple[Path, ...]:
    """Return one path, or several, or None, as a tuple; `~` is the home directory."""
    return tuple(expanded(path) for path in _several(value))


def models(value: Any) -> tuple[Any, ...]:
    """Return one model (a name, a directory, or one in memory), or several, or None, as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


def path(value: str | Path | None) -> Path | None:
    """Return a path in which `~` is the home directory."""
    return None if value is None else expanded(value)


def absolute_path(value: str | Path | None) -> Path | None:
    """Return an absolute path in which `~` is the home directory."""
    return None if value is None else Path(os.path.abspath(expanded(value)))


def expanded(value: str | Path) -> Path:
    """Return a path in which `~` is the home directory. Raises `UserError` for that of a user who is not there."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise UserError(f"'{value}' begins with the home of a user who is not there; write ./{value} for such a name.")
    return Path(path)


def whole_numbers(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return one number or several as a tuple."""
    return tuple(_several(value))


def numbers(value: float | Sequence[float]) -> tuple[float, ...]:
    """Return one number or several as a tuple."""
    return tuple(_several(value))


def maybe_whole_numbers(value: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return one number or several as a tuple, or None."""
    return None if value is None else tuple(_several(value))


def _several(value: Any) -> Sequence[Any]:
    return [value] if isinstance(value, str | Path | int | float) else list(() if value is None else value)
