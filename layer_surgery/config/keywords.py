"""The Python interface's keyword arguments: those of an options class, as types, signature and documentation."""

from __future__ import annotations

import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import attrs

from layer_surgery.config.choices import described
from layer_surgery.config.declaring import Options, about_of, fields_of, grouped
from layer_surgery.config.surgery import LISTED_BELOW
from layer_surgery.errors import UserError, nearest_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = ParamSpec("P")
O = TypeVar("O", bound=Options)  # noqa: E741
R_co = TypeVar("R_co", covariant=True)


#: What values of a field may be, by the annotation of one of them, and what errors call one and several. Numbers of
#: numpy are refused, because they would stop the writing of `surgery.json` at the end of a run.
_TYPES: dict[str, tuple[Any, str, str]] = {
    "int": (int, "a whole number", "whole numbers"),
    "float": (int | float, "a number", "numbers"),
    "bool": (bool, "True or False", ""),
    "str": (str | os.PathLike, "a text", "texts"),
    "Path": (str | os.PathLike, "a path", "paths"),
}


class OnModel(Protocol[P, R_co]):
    """A function of a model, with an option for each field of an options class."""

    def __call__(self, model: str | Path | PreTrainedModel, *args: P.args, **options: P.kwargs) -> R_co: ...


class WithOutput(Protocol[P, R_co]):
    """The same, with the output as a second positional argument too."""

    def __call__(
        self, model: str | Path | PreTrainedModel, output: str | Path | None = None, *args: P.args, **options: P.kwargs
    ) -> R_co: ...


def on_model(options: Callable[P, O]) -> Callable[[Callable[[Any, O], R_co]], OnModel[P, R_co]]:
    """Return a decorator that turns `f(model, options)` into `f(model, *, <an argument for each option>)`."""
    return functools.partial(_with_keywords, options=options, positional=("model",))


def with_output(options: Callable[P, O]) -> Callable[[Callable[[Any, O], R_co]], WithOutput[P, R_co]]:
    """Return a decorator like `on_model`'s whose function takes `output` as its second positional argument too."""
    return functools.partial(_with_keywords, options=options, positional=("model", "output"))


def check_call(function: str, options: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """Raise `TypeError` for arguments that a function does not have, `UserError` for values of a wrong type."""
    if args:
        raise TypeError(f"{function}() takes options by name only; one that was given has none: {args[0]!r}")
    known = {field.name: field for field in fields_of(options)}
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument '{name}'.{nearest_name(name, known)}")
        check_type(known[name], value)


def check_type(field: attrs.Attribute[Any], value: Any) -> None:
    """Raise `UserError` unless a value has the type of a field, or each of several values its items' type.

    Fields of other types than numbers, flags, texts and paths are left to their converters, and so are values that
    can be gone through only once.
    """
    annotation = str(field.type)
    optional, kind = annotation.endswith(" | None"), annotation.removesuffix(" | None")
    several, kind = kind.startswith("tuple["), kind.removeprefix("tuple[").removesuffix(", ...]")
    converted = field.converter is not None and kind == "str" and not several  # a torch.device, a torch.dtype
    if kind not in _TYPES or converted or (value is None and (optional or several)):
        return
    types, singular, plural = _TYPES[kind]
    items = value if several and isinstance(value, Collection) and not isinstance(value, str) else (value,)
    if isinstance(value, Iterator) or all(isinstance(item, types) for item in items):
        return
    raise UserError(f"{about_of(field).option(field.name)} is {value!r}; give {plural if several else singular}.")


def _with_keywords(function: Any, *, options: Any, positional: tuple[str, ...]) -> Any:
    """Return a function of the options, with the signature that editors, `help` and notebooks show, and their help."""

    @functools.wraps(function)
    def call(model: Any, *args: Any, **given: Any) -> Any:
        by_position = dict(zip(positional[1:], args, strict=False))
        for name in by_position.keys() & given.keys():
            raise TypeError(f"{function.__name__}() got multiple values for argument '{name}'")
        given |= by_position
        check_call(function.__name__, options, args[len(positional) - 1 :], given)
        return function(model, options(**given))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter(name, kind) for name in positional[:1]]
    first += [inspect.Parameter(name, kind, default=None) for name in positional[1:]]
    arguments = inspect.signature(options).parameters
    rest = [arguments[field.name] for field in fields_of(options) if field.name not in positional]
    call.__signature__ = inspect.Signature([*first, *rest])  # type: ignore[attr-defined]
    text = inspect.cleandoc(function.__doc__ or "")
    call.__doc__ = text + "\n\nOptions:\n" + "\n".join(_documented(options, positional)) + "\n"
    return call


def _documented(options: type[Options], positional: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a docstring about the options, under the headings of the command line's help."""
    types = {name: parameter.annotation for name, parameter in inspect.signature(options).parameters.items()}
    for group, fields in grouped(options).items():
        listed = [field for field in fields if field.name not in positional]
        if listed:
            yield f"    {group}:"
        for field in listed:
            about = about_of(field)
            words = f" [{about.values}]" if about.form == "value" and "|" in about.values else ""
            default = about.default or repr(field.default)
            annotation = types[field.name]
            kind = "" if annotation is inspect.Parameter.empty else f" ({annotation})"
            yield _filled(f"{field.name}{kind}: {about.help}{words} (default: {default})", 8)
    names = {field.name for field in attrs.fields(options)}
    for option, title, choices, chosen in LISTED_BELOW:
        if option in names:
            yield f"\n{title}:"
            yield from (_filled(f"{name}: {text}", 4) for name, text in described(choices, chosen))


def _filled(text: str, indent: int) -> str:
    return textwrap.fill(text, 110, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4))
