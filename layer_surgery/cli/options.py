"""Options of the command line, made of the declarations in `layer_surgery.config`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import click

from layer_surgery.cli.completion import Completed, CompletedPath
from layer_surgery.config.declaring import About, Group, Options, about_of, fields_of, grouped
from layer_surgery.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])
#: Between the name of a flag and that of an option behind it, where click names an argument.
_INNER = "__"
#: What click takes a value for, by its annotation; everything else is text.
_TYPES: dict[str, Any] = {"int": int, "float": float}
_METAVARS = {"int": "N", "float": "F"}


class GroupedOption(click.Option):
    """An option that help lists under a heading."""

    def __init__(self, *args: Any, group: Group, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group: Group = group


def option(*names: str, group: Group, **settings: Any) -> Callable[[F], F]:
    """Return a decorator like `click.option`'s, for an option under a heading."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def options_of(config: type[Options], *, required: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Return a decorator that adds an option for each field of a configuration that the command line has.

    Options that are not given are None, so that defaults live in the configuration alone: see `given`.
    """

    def decorate(function: F) -> F:
        fields = [(group, field) for group, fields in grouped(config).items() for field in fields]
        for group, field in reversed(fields):
            about = about_of(field)
            if about.inner is not None:
                function = _inner(field, group, about.inner)(function)
            elif about.terminal:
                function = _option(field, group, required=field.name in required)(function)
        return function

    return decorate


NO_EVAL = option("--no-eval", is_flag=True, group="Evaluation", help="Do not measure perplexity and distance.")
AS_JSON = option("--json", "as_json", is_flag=True, group="Output", help="Print the result as JSON on stdout.")
#: Whether `--quiet` is given, in the `meta` of click's context.
QUIET_KEY = "layer_surgery.quiet"
QUIET = option(
    "-q",
    "--quiet",
    is_flag=True,
    expose_value=False,
    group="Runtime",
    help="Print nothing but the result and errors: no progress, no notes.",
    callback=lambda context, _parameter, given: context.meta.update({QUIET_KEY: given}),
)
#: `main` looks for it itself.
DEBUG = option(
    "--debug",
    is_flag=True,
    expose_value=False,
    group="Runtime",
    help="Show tracebacks and the libraries' own messages.",
)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as keyword arguments; `--no-eval` is `eval_data` without texts.

    The options behind a flag are one argument, a dictionary. Raises `UserError` if they are given without it, and for
    texts to measure on beside `--no-eval`.
    """
    without_texts = {"eval_data": ()} if options.pop("no_eval", False) else {}
    if without_texts and options.get("eval_data") is not None:
        raise UserError("--no-eval measures on no text and --eval-data names one; use one of the two.")
    known = {name: value for name, value in options.items() if value is not None} | without_texts
    for name in [name for name in known if _INNER in name]:
        outer, _, inner = name.partition(_INNER)
        if outer not in known:
            flag = f"--{outer.replace('_', '-')}"
            raise UserError(f"{flag}-{inner.replace('_', '-')} only counts with {flag}; add that, or leave it out.")
        known[outer] = ({} if known[outer] is True else known[outer]) | {inner: known.pop(name)}
    return known


def _inner(field: attrs.Attribute[Any], group: Group, inner: type[Options]) -> Callable[[F], F]:
    """Return a decorator that adds a flag and, behind its name, the options of a class."""

    def decorate(function: F) -> F:
        about = about_of(field)
        for each in reversed(fields_of(inner)):
            function = _option(each, group, required=False, flag=field.name)(function)
        help = _help(field, about)
        return option(about.option(field.name), field.name, group=group, is_flag=True, default=None, help=help)(
            function
        )

    return decorate


def _option(field: attrs.Attribute[Any], group: Group, *, required: bool, flag: str = "") -> Callable[[F], F]:
    about = about_of(field)
    kind = _kind(field, about)
    name, argument = about.option(field.name), field.name
    if flag:
        name, argument = f"--{flag.replace('_', '-')}-{name[2:]}", f"{flag}{_INNER}{argument}"
    settings: dict[str, Any] = {
        "default": None,
        "help": _help(field, about),
        "metavar": about.values or _METAVARS.get(str(field.type).removesuffix(" | None")),
    }
    if about.form == "switch":
        return option(f"{name}/--no-{name[2:]}", argument, group=group, default=None, help=settings["help"])
    if kind is bool:
        return option(name, argument, group=group, is_flag=True, default=None, help=settings["help"])
    if about.form == "size":
        settings |= {"callback": _size}
    elif about.form == "list":
        settings |= {"multiple": True, "callback": _list_of(kind, about), "type": Completed.of(about)}
    elif about.form == "repeat":
        settings |= {"multiple": True, "type": kind, "callback": lambda _context, _parameter, given: given or None}
    else:
        settings |= {"type": kind}
    if required:
        del settings["default"]  # for click a default of None is a value too
    return option(name, argument, group=group, required=required, **settings)


def _kind(field: attrs.Attribute[Any], about: About) -> Any:
    """Return the type of one value, from the field's annotation (a text): `tuple[int, ...] | None` is int."""
    annotation = str(field.type).removesuffix(" | None").removeprefix("tuple[").removesuffix(", ...]")
    if annotation == "Path":
        return CompletedPath(about)
    return bool if annotation == "bool" else _TYPES.get(annotation) or Completed.of(about)


def _help(field: attrs.Attribute[Any], about: About) -> str:
    default, value = about.default, field.default
    if default is None and about.form == "switch":
        default = f"{'' if value else 'no-'}{about.option(field.name)[2:]}"
    elif default is None and value is not None and value is not False and value != ():
        default = ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
    return f"{about.help}  [default: {default}]" if default else about.help


def _list_of(kind: Callable[[str], Any], about: About) -> Callable[..., tuple[Any, ...] | None]:
    """Return a callback for several values between commas; the option may be given several times too."""

    def values(_context: click.Context, _parameter: click.Parameter, given: Any) -> tuple[Any, ...] | None:
        if not given:
            return None
        text = ",".join(given)
        try:
            return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
        except ValueError:
            raise click.BadParameter(
                f"'{text}' is not a list of {about.items}; give for example {about.example}."
            ) from None

    return values


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    """Return `8GB` or `500MiB` in bytes."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"'{value}' is not a size; give for example 8GB or 500MiB.")
    number, unit, binary = match.groups()
    size = float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
    if size >= 2**63:
        raise click.BadParameter(f"'{value[:40]}' is more than any machine has; give for example 8GB or 500MiB.")
    return int(size)
