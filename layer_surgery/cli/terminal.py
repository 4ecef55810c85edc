"""Output on a terminal, which must not obey what stands in names of files, tensors or tasks."""

import json
import re
from collections.abc import Iterable
from typing import Any

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from layer_surgery.reporting.text import printable


class HarmlessConsole(Console):
    """A console on which control characters in a text are shown and not obeyed; rich itself lets escapes through."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the segments of a renderable, with the text of each made harmless."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def print_json(data: Any) -> None:
    """Print data as JSON on stdout."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    # JSON leaves these control characters, the only ones that it does not escape, as they are.
    click.echo(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))
