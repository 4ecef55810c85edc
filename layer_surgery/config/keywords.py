"""The Python interface's keyword arguments: those of an options class, as types, signature and documentation."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from layer_surgery.config.declaring import Options, about_of, fields_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = ParamSpec("P")
O = TypeVar("O", bound=Options)  # noqa: E741
R_co = TypeVar("R_co", covariant=True)


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


def _with_keywords(function: Any, *, options: Any, positional: tuple[str, ...]) -> Any:
    """Return a function of the options, with the signature that editors, `help` and notebooks show, and their help."""

    @functools.wraps(function)
    def call(model: Any, output: Any = None, *args: Any, **given: Any) -> Any:
        return function(model, options(*args, **given if output is None else {**given, "output": output}))

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
    for field in fields_of(options):
        if field.name in positional:
            continue
        about = about_of(field)
        default = about.default if about.default is not None else repr(field.default)
        text = f"{field.name}: {about.help}" + (f" (default: {default})" if default else "")
        yield textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="        ")
