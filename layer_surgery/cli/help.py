"""How commands show their help: options under headings, what can be chosen by name, and examples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import click

from layer_surgery.cli.options import GroupedOption
from layer_surgery.cli.strict import Strict
from layer_surgery.config import LISTED_BELOW
from layer_surgery.config.choices import described
from layer_surgery.config.declaring import GROUPS, Group

#: Heading of options that have none, such as click's own `--help`.
_REST: Group = "Runtime"


class GroupedCommand(Strict):
    """A command whose help has its options under headings, and ends with what there is to choose from and examples."""

    def __init__(self, *args: Any, examples: Mapping[str, str], **settings: Any) -> None:
        """Make a command; `examples` are command lines without the program's name, by what they do."""
        super().__init__(*args, **settings)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[Group, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                rows[parameter.group if isinstance(parameter, GroupedOption) else _REST].append(record)
        for group, records in rows.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = {parameter.name for parameter in self.params}
        for option, title, choices, chosen in LISTED_BELOW:
            if option in options:
                with formatter.section(title):
                    formatter.write_dl(list(described(choices, chosen)))
        with formatter.section("Examples"):
            for number, (does, command) in enumerate(self.examples.items()):
                if number:
                    formatter.write_paragraph()
                formatter.write_text(f"{does}:")
                formatter.write(_on_lines(f"layer-surgery {command}", formatter.width, formatter.current_indent + 2))


class Program(click.Group):
    """A program whose help lists its commands in the order in which they are used, each with its whole summary."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            summaries = [(name, (command.help or "").split("\n\n")[0]) for name, command in self.commands.items()]
            formatter.write_dl([(name, " ".join(summary.split())) for name, summary in summaries])


def _on_lines(command: str, width: int, indent: int) -> str:
    """Return a command as lines that a shell takes as one, broken before options where it is wider than `width`."""
    lines: list[str] = []
    for part in re.split(r" (?=--|> )", command):
        if lines and len(lines[-1]) + len(part) + indent + 3 <= width:  # with a space, and " \\" behind it
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}" if lines else part)
    return " " * indent + f" \\\n{' ' * indent}".join(lines) + "\n"
