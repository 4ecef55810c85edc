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

    def decorate(function: Callable[[Any, O], R_co]) -> OnModel[P, R_co]:
        @functools.wraps(function)
        def call(model: Any, *args: P.args, **given: P.kwargs) -> R_co:
            return function(model, options(*args, **given))

        described: OnModel[P, R_co] = _described(call, options, positional=("model",))
        return described

    return decorate


def with_output(options: Callable[P, O]) -> Callable[[Callable[[Any, O], R_co]], WithOutput[P, R_co]]:
    """Return a decorator like `on_model`'s whose function takes `output` as its second positional argument too."""

    def decorate(function: Callable[[Any, O], R_co]) -> WithOutput[P, R_co]:
        @functools.wraps(function)
        def call(model: Any, output: str | Path | None = None, *args: P.args, **given: P.kwargs) -> R_co:
            if output is not None:
                given["output"] = output
            return function(model, options(*args, **given))

        described: WithOutput[P, R_co] = _described(call, options, positional=("model", "output"))
        return described

    return decorate


def _described(function: Any, options: Any, positional: tuple[str, ...]) -> Any:
    """Give a function the signature that editors, `help` and notebooks show, and the documentation of its options."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    first = [inspect.Parameter(name, kind) for name in positional[:1]]
    first += [inspect.Parameter(name, kind, default=None) for name in positional[1:]]
    arguments = inspect.signature(options).parameters
    rest = [arguments[field.name] for field in fields_of(options) if field.name not in positional]
    function.__signature__ = inspect.Signature([*first, *rest])
    text = inspect.cleandoc(function.__doc__ or "")
    function.__doc__ = text + "\n\nOptions:\n" + "\n".join(_documented(options, positional)) + "\n"
    return function


def _documented(options: type[Options], positional: tuple[str, ...]) -> Iterator[str]:
    for field in fields_of(options):
        about = about_of(field)
        if field.name in positional:
            continue
        default = about.default if about.default is not None else repr(field.default)
        text = f"{field.name}: {about.help}" + (f" (default: {default})" if default else "")
        yield textwrap.fill(text, 110, initial_indent="    ", subsequent_indent="        ")
