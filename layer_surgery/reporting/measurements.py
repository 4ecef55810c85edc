"""What was measured of one model, or of two side by side, as a table for people. Computes nothing new."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from layer_surgery.records import Comparison, Continuation, EvaluationResult, Interval, SpeedPoint

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
    rows = [*_sizes(results), *_perplexities(results, comparison), *_distances(comparison)]
    rows += [*_tasks(results, comparison), *_speeds(results)]
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


def _sizes(results: list[EvaluationResult]) -> Iterator[Row]:
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
        yield label, cells, _percent(known) if len(known) == len(values) else ""


def _perplexities(results: list[EvaluationResult], comparison: Comparison | None) -> Iterator[Row]:
    for name in dict.fromkeys(name for result in results for name in result.perplexity):
        found = [result.perplexity.get(name) for result in results]
        tokens = next(value.tokens for value in found if value is not None)
        change = ""
        if comparison is not None and name in comparison.perplexity:
            change = f"x {_interval(comparison.perplexity[name].ratio, '.3f')}"
        elif len(found) == 2 and found[0] is not None and found[1] is not None:
            change = f"x {found[1].value / found[0].value:.3f}"
        values = ["-" if value is None else _with_error(value.value, value.stderr) for value in found]
        yield f"perplexity, {name}\n  ({tokens:,} tokens)", values, change


def _distances(comparison: Comparison | None) -> Iterator[Row]:
    if comparison is None:
        return
    for name, divergence in comparison.kl_divergence.items():
        mean = _with_error(divergence.mean, divergence.stderr, ".4f")
        yield f"KL, {name} (nats)", ["", mean], ""
        yield "  99.9th percentile", ["", f"{divergence.p99_9:.3f}"], ""
        agreement = comparison.top1_agreement[name]
        yield f"top-1, {name}", ["", _with_error(agreement.value, agreement.stderr, ".4f")], ""


def _tasks(results: list[EvaluationResult], comparison: Comparison | None) -> Iterator[Row]:
    for name in dict.fromkeys(name for result in results for name in result.tasks):
        found = [result.tasks.get(name) for result in results]
        some = next(task for task in found if task is not None)
        for metric in some.metrics:
            values = [None if task is None else task.metrics.get(metric) for task in found]
            cells = ["-" if value is None else _with_error(value.value, value.stderr, ".4f") for value in values]
            interval = comparison.tasks.get(name, {}).get(metric) if comparison is not None else None
            change = _interval(interval, "+.4f") if interval is not None else ""
            yield f"{name}, {metric}\n  ({some.items:,} items)", cells, change


def _speeds(results: list[EvaluationResult]) -> Iterator[Row]:
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
            yield label, [f"{value:,.1f}" for value in values], _percent(values)


def _percent(values: list[float]) -> str:
    return f"{(values[1] / values[0] - 1) * 100:+.1f} %" if len(values) == 2 and values[0] else ""


def _interval(interval: Interval, form: str) -> str:
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _with_error(value: float, stderr: float | None, form: str = ",.2f") -> str:
    if stderr is None:
        return f"{value:.4g}"
    return f"{value:{form}} ± {stderr:{form}}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
