"""What was measured of one model, or of two side by side, as a table for people. Computes nothing new."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from layer_surgery.records import Comparison, Continuation, EvaluationResult, SpeedPoint
from layer_surgery.reporting.formats import percent_change, with_error, with_interval

#: Label, value of each model (the last one is the model after), change.
Row = tuple[str, list[str], str]


def print_measurements(
    console: Console,
    before: EvaluationResult | None,
    after: EvaluationResult,
    comparison: Comparison | None,
    titles: tuple[str, str, str],
) -> None:
    """Print one evaluation, or two side by side with the change; paired intervals stand in brackets."""
    results = [after] if before is None else [before, after]
    rows = [*size_rows(results), *perplexity_rows(results, comparison), *distance_rows(comparison)]
    rows += [*task_rows(results, comparison), *speed_rows(results)]
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("", overflow="fold")
    cells = [[label, *values, change] if before is not None else [label, *values] for label, values, change in rows]
    for column, title in enumerate(titles[: len(cells[0]) - 1], start=1):
        # Names may be folded on a narrow terminal; numbers must not be.
        width = max(len(row[column]) for row in cells)
        table.add_column(escape(title), justify="right", overflow="fold", min_width=width)
    for row in cells:
        table.add_row(*map(escape, row))
    console.print(table)


def print_continuations(console: Console, continuations: list[Continuation], titles: tuple[str, str]) -> None:
    """Print what the models wrote after each prompt."""
    for number, continuation in enumerate(continuations, start=1):
        table = Table(box=None, pad_edge=False, show_header=False, title_justify="left", padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(f"prompt {number}", Text(_one_line(continuation.prompt), style="bold"))
        if continuation.before is not None:
            table.add_row(titles[0], Text(_one_line(continuation.before)))
        table.add_row(titles[1], Text(_one_line(continuation.after)))
        console.print(table)


def size_rows(results: list[EvaluationResult]) -> Iterator[Row]:
    """Yield what can be said without running the models."""
    for label, attribute in (
        ("layers", "layers"),
        ("parameters", "parameters"),
        ("bytes", "size_bytes"),
        ("KV cache bytes/token", "kv_cache_bytes_per_token"),
        ("FLOPs/token", "flops_per_token"),
    ):
        values = [getattr(result, attribute) for result in results]
        known = [float(value) for value in values if value is not None]
        cells = ["-" if value is None else f"{value:,}" for value in values]
        yield label, cells, percent_change(known) if len(known) == len(values) else ""


def perplexity_rows(results: list[EvaluationResult], comparison: Comparison | None) -> Iterator[Row]:
    """Yield a row for each text."""
    for name in dict.fromkeys(name for result in results for name in result.perplexity):
        found = [result.perplexity.get(name) for result in results]
        tokens = next(value.tokens for value in found if value is not None)
        change = ""
        if comparison is not None and name in comparison.perplexity:
            change = f"x {with_interval(comparison.perplexity[name].ratio, '.3f')}"
        elif len(found) == 2 and found[0] is not None and found[1] is not None:
            change = f"x {found[1].value / found[0].value:.3f}"
        values = ["-" if value is None else with_error(value.value, value.stderr) for value in found]
        yield f"perplexity, {name}\n  ({tokens:,} tokens)", values, change


def distance_rows(comparison: Comparison | None) -> Iterator[Row]:
    """Yield how far the models are from each other on each text."""
    if comparison is None:
        return
    for name, divergence in comparison.kl_divergence.items():
        mean = with_error(divergence.mean, divergence.stderr, ".4f")
        yield f"KL, {name} (nats)", ["", mean], ""
        yield "  99.9th percentile", ["", f"{divergence.p99_9:.3f}"], ""
        agreement = comparison.top1_agreement[name]
        yield f"top-1, {name}", ["", with_error(agreement.value, agreement.stderr, ".4f")], ""


def task_rows(results: list[EvaluationResult], comparison: Comparison | None) -> Iterator[Row]:
    """Yield a row for each metric of each task."""
    for name in dict.fromkeys(name for result in results for name in result.tasks):
        found = [result.tasks.get(name) for result in results]
        some = next(task for task in found if task is not None)
        for metric in some.metrics:
            values = [None if task is None else task.metrics.get(metric) for task in found]
            cells = ["-" if value is None else with_error(value.value, value.stderr, ".4f") for value in values]
            interval = comparison.tasks.get(name, {}).get(metric) if comparison is not None else None
            change = with_interval(interval, "+.4f") if interval is not None else ""
            yield f"{name}, {metric}\n  ({some.items:,} items)", cells, change


def speed_rows(results: list[EvaluationResult]) -> Iterator[Row]:
    """Yield rows for each batch size and prompt length; the first has no values and says which."""
    for points in zip_longest(*(result.speed for result in results)):
        if None in points:
            continue
        first: SpeedPoint = points[0]
        yield f"speed, {first.batch_size} x {first.prompt_tokens} tokens", [""] * len(points), ""
        for label, attribute, factor in (
            ("  prefill, tokens/s", "prefill_tokens_per_second", 1.0),
            ("  decoding, tokens/s", "decode_tokens_per_second", 1.0),
            ("  first token, ms", "time_to_first_token_seconds", 1e3),
            ("  a token, median, ms", "latency_p50_seconds", 1e3),
            ("  a token, 95th percentile, ms", "latency_p95_seconds", 1e3),
            ("  peak memory, MB", "peak_memory_bytes", 1e-6),
        ):
            values = [getattr(point, attribute) * factor for point in points]
            yield label, [f"{value:,.1f}" for value in values], percent_change(values)


def _one_line(text: str) -> str:
    return " ".join(text.split())
