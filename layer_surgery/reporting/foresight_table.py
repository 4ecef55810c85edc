"""What a run will take, as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layer_surgery.records.foresight import Foresight


def print_foresight(console: Console, found: Foresight) -> None:
    """Print seconds and memory of every stage, the disk that it takes, and what is left out."""
    console.print(
        f"[bold]{escape(found.model)}[/] on {escape(found.device)} in {found.dtype}; nothing was run but a short probe",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("about", "memory"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("most of it for", overflow="fold")
    for stage in found.stages:
        largest = max(stage.parts, key=lambda part: stage.parts[part], default="")
        table.add_row(escape(stage.title), _duration(stage.seconds), _bytes(stage.memory_bytes), largest)
    table.add_row("in all", _duration(found.seconds), _bytes(found.memory_bytes), "")
    console.print(table)
    if found.memory_available_bytes is not None:
        console.print(f"memory that may be taken: {_bytes(found.memory_available_bytes)}", highlight=False)
    console.print(
        f"disk: {_bytes(found.output_bytes)} for the result ({_bytes(found.output_free_bytes)} free), up to "
        f"{_bytes(found.scratch_bytes)} of scratch files ({_bytes(found.scratch_free_bytes)} free)",
        highlight=False,
    )
    for each in found.kept:
        line = f"{each.option}: up to {_bytes(each.bytes)} ({_bytes(each.free_bytes)} free)"
        console.print(line, highlight=False)
    if found.left_out:
        console.print(f"not in the times: {escape('; '.join(found.left_out))}", highlight=False)


def _duration(seconds: float | None) -> str:
    """Return seconds in two digits or so: a probe does not know more."""
    if seconds is None:
        return "not known"
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
