"""What a compression came to, in a few plain sentences. Used by the page and by the model card."""

from __future__ import annotations

from collections.abc import Iterator

from layer_surgery.records import SurgeryPlan, SurgeryReport
from layer_surgery.reporting.formats import number_list, with_interval


def summary(report: SurgeryReport) -> list[str]:
    """Return sentences: what was done, what it saved, what it cost."""
    return [*_done(report), *_saved(report), *_lost(report)]


def operations(plan: SurgeryPlan) -> Iterator[str]:
    """Yield what was done to which layers: `removed 3 of 12 layers (4-6)`."""
    count = len(plan.layers)
    removed = [layer.index for layer in plan.layers if layer.action == "remove"]
    without = [layer.index for layer in plan.low_rank if not any(layer.ranks.values())]
    low_rank = [layer.index for layer in plan.low_rank if layer.index not in without]
    if removed:
        yield f"removed {len(removed)} of {count} layers ({number_list(removed)})"
    if without:
        yield f"removed parts of {len(without)} of {count} layers ({number_list(without)})"
    if low_rank:
        yield f"replaced linears of {len(low_rank)} of {count} layers ({number_list(low_rank)}) by low-rank components"


def _done(report: SurgeryReport) -> Iterator[str]:
    what = " and ".join(operations(report.plan)) or "changed no layer"
    solved = len({(record.layer, record.linear) for record in report.refit if record.ridge is not None})
    refit = f", and re-solved {solved} linears so that the rest follows the original" if solved else ""
    yield f"{what[:1].upper()}{what[1:]}{refit}."


def _saved(report: SurgeryReport) -> Iterator[str]:
    before, after = report.before, report.after
    if before.parameters:
        fewer = 100 * (1 - after.parameters / before.parameters)
        yield (
            f"{fewer:.1f} % fewer parameters: {before.parameters:,} before, {after.parameters:,} after "
            f"({_megabytes(before.size_bytes)} and {_megabytes(after.size_bytes)})."
        )
    if before.speed and after.speed and before.speed[0].decode_tokens_per_second:
        old, new = before.speed[0], after.speed[0]
        quotient = new.decode_tokens_per_second / old.decode_tokens_per_second
        yield (
            f"Decoding at x {quotient:.2f} of the speed ({old.decode_tokens_per_second:,.1f} and "
            f"{new.decode_tokens_per_second:,.1f} tokens per second, batch {old.batch_size})."
        )


def _lost(report: SurgeryReport) -> Iterator[str]:
    for name, change in report.comparison.perplexity.items():
        before, after = report.before.perplexity.get(name), report.after.perplexity.get(name)
        if before is not None and after is not None:
            yield (
                f"Perplexity on {name}: {before.value:,.2f} before, {after.value:,.2f} after, "
                f"x {with_interval(change.ratio, '.3f')}."
            )
    groups = [name for name, task in report.after.tasks.items() if task.group]
    for name in groups or list(report.after.tasks)[:3]:
        for metric, interval in list(report.comparison.tasks.get(name, {}).items())[:1]:
            before_task = report.before.tasks[name].metrics[metric].value
            after_task = report.after.tasks[name].metrics[metric].value
            yield (
                f"Task {name} ({metric.partition(',')[0]}): {before_task:.3f} before, {after_task:.3f} after, "
                f"{with_interval(interval, '+.3f')}."
            )
    if report.comparison.perplexity or report.comparison.tasks:
        yield "In brackets: 95 % paired bootstrap intervals."
    else:
        yield "Its quality was not compared with the original's."


def _megabytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} bytes"
