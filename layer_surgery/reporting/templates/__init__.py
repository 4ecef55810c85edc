"""The templates of page and card, and their rendering: everything from outside is escaped."""

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from layer_surgery.machine import version
from layer_surgery.reporting.figures.svg import COLOURS
from layer_surgery.reporting.text import breakable, code_block, code_span, markdown, printable, quiet


def render(template: str, /, **values: Any) -> str:
    """Fill a template of this folder. `.html` templates escape what they are given; Markdown uses its filters."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    """Return where templates are compiled, each once in a process."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Not what a filter has made safe.
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else printable(value),
    )
    environment.filters |= {
        "code": code_span,
        "block": code_block,
        "md": markdown,
        "quiet": quiet,
        "breakable": breakable,
    }
    environment.globals |= {"colours": COLOURS, "version": version("layer-surgery") or ""}
    return environment
