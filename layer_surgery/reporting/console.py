"""Records as tables for people. Computes nothing new."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layer_surgery.records import EvaluationResult, LayerScores, SurgeryPlan, SurgeryReport

_BLOCKS = "▏▎▍▌▋▊▉█"


def print_report(console: Console, report: SurgeryReport) -> None:
    """Print what was done to which layers, and before against after."""
    plan = report.plan
    removed = [layer.index for layer in plan.layers if layer.action == "remove"]
    console.print(
        f"[bold]{escape(report.base_model['name'])}[/]: {plan.target_layers} of {len(plan.layers)} layers whole; "
        + "; ".join(
            text
            for text in (
                f"removed: {_indices(removed)}" if removed else "",
                f"low-rank: {_indices([layer.index for layer in plan.low_rank])}" if plan.low_rank else "",
            )
            if text
        ),
        highlight=False,
    )
    if plan.low_rank:
        print_ranks(console, plan)
    print_comparison(console, report.before, report.after, ("before", "after", "change"))
    if report.output is None:
        console.print("dry run: nothing was written", highlight=False)
    else:
        console.print(f"saved to [bold]{escape(report.output)}[/] (report: surgery.json)", highlight=False)


def print_ranks(console: Console, plan: SurgeryPlan) -> None:
    """Print the rank of every linear of the low-rank layers."""
    names = list(dict.fromkeys(name for layer in plan.low_rank for name in layer.ranks))
    table = Table(title="ranks", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    for title in _short(names):
        table.add_column(title, justify="right", overflow="fold")
    for layer in plan.low_rank:
        table.add_row(str(layer.index), *(str(layer.ranks.get(name, "-")) for name in names))
    console.print(table)


def _short(names: list[str]) -> list[str]:
    """Return the last parts of names, and of those that end alike (GPT-2's two `c_proj`) as many as tell them apart."""
    lasts = [name.rpartition(".")[2] for name in names]
    return [last if lasts.count(last) == 1 else name for name, last in zip(names, lasts, strict=True)]


def print_comparison(
    console: Console, first: EvaluationResult, second: EvaluationResult | None, titles: tuple[str, str, str]
) -> None:
    """Print one evaluation, or two side by side with the change."""
    rows: list[list[str]] = []
    for label, attribute in (("layers", "layers"), ("parameters", "parameters"), ("bytes", "size_bytes")):
        a = getattr(first, attribute)
        cells = [label, f"{a:,}"]
        if second is not None:
            b = getattr(second, attribute)
            cells += [f"{b:,}", f"{(b / a - 1) * 100:+.1f} %"]
        rows.append(cells)
    for name, a in first.perplexity.items():
        cells = [f"perplexity, {escape(name)}\n  ({a.tokens:,} tokens)", _with_error(a.value, a.stderr)]
        if second is not None:
            b = second.perplexity[name]
            cells += [_with_error(b.value, b.stderr), f"x {b.value / a.value:.3f}"]
        rows.append(cells)
    table = Table(box=None, pad_edge=False, title_justify="left")
    table.add_column("", overflow="fold")
    for column, title in enumerate(titles if second is not None else titles[:1], start=1):
        # Names may be folded on a narrow terminal; numbers must not be.
        width = max(len(row[column]) for row in rows)
        table.add_column(escape(title), justify="right", overflow="fold", min_width=width)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def print_scores(console: Console, scores: LayerScores) -> None:
    """Print the layers ranked, the least important first, with a bar for each value."""
    table = Table(box=None, pad_edge=False, title=f"{scores.scorer}: {scores.quantity}", title_justify="left")
    for title in ("goes", "layer", "value"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    span = max((abs(value) for value in scores.values), default=0.0) or 1.0
    rest = sorted(
        (i for i in range(len(scores.values)) if i not in scores.removal_order), key=lambda i: scores.values[i]
    )
    for place, index in enumerate([*scores.removal_order, *rest], start=1):
        value = scores.values[index]
        goes = str(place) if index in scores.removal_order else "stays"
        table.add_row(goes, str(index), f"{value:.5g}", _bar(abs(value) / span))
    console.print(table)


def _bar(fraction: float, width: int = 24) -> str:
    eighths = round(fraction * width * 8)
    full, part = divmod(eighths, 8)
    return "█" * full + (_BLOCKS[part - 1] if part else "")


def _with_error(value: float, stderr: float | None) -> str:
    if stderr is None:
        return f"{value:.4g}"
    return f"{value:,.2f} ± {stderr:.2f}"


def _indices(indices: list[int]) -> str:
    return ", ".join(str(index) for index in indices)
