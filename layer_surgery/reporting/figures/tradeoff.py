"""The figure of quality against size that compares results."""

from collections.abc import Sequence
from itertools import cycle
from typing import NamedTuple

from matplotlib.figure import Figure

from layer_surgery.records import Interval
from layer_surgery.records.sweep import beats
from layer_surgery.reporting.figures.svg import INK, MUTED, SERIES, Plot, draw
from layer_surgery.reporting.text import plain_label

#: In a plot with more results than this only those on the front are numbered.
_NUMBERED = 12


class Point(NamedTuple):
    """A result in the plot."""

    number: int  #: In the table of results.
    share: float  #: Parameters, per cent of the original's.
    ratio: Interval  #: Perplexity after over before.
    kind: str  #: The kind of surgery in few words; each has a colour and a marker.


def tradeoff(key: str, text: str, points: Sequence[Point]) -> Plot:
    """Return perplexity on a text against parameters; results that no other beats are filled and joined by a line."""
    best = undominated(points)
    kinds = list(dict.fromkeys(point.kind for point in points))
    crowded = len(points) > _NUMBERED

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        line = sorted((point.share, point.ratio.value) for point in best)
        axes.plot([x for x, _ in line], [y for _, y in line], color=MUTED, linewidth=1, linestyle="--")
        for point in points:
            colour, marker = SERIES[kinds.index(point.kind) % len(SERIES)]
            axes.plot([point.share] * 2, [point.ratio.low, point.ratio.high], color=colour, linewidth=1.2)
            fill = "full" if point in best else "none"
            axes.plot(point.share, point.ratio.value, marker, color=colour, markersize=7, fillstyle=fill)
        for place, numbers in _at_one_place(best if crowded else points).items():
            axes.annotate(numbers, place, xytext=(6, 5), textcoords="offset points", color=INK, fontsize=10)
        if len(kinds) > 1:
            for (colour, marker), kind in zip(cycle(SERIES), kinds, strict=False):
                axes.plot([], [], marker, color=colour, label=plain_label(kind, 40))
            figure.legend(loc="outside upper left", ncols=2)
        axes.axhline(1, color=INK, linewidth=1)
        axes.set_xlabel("parameters, % of the original")
        axes.set_ylabel("perplexity, x the original's")
        if crowded:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.margins(0.12)

    words = "; ".join(f"{point.number}: {point.share:.1f} %, x {point.ratio.value:.3f}" for point in points)
    return draw(
        key,
        f"Perplexity against size, {text}",
        f"Scatter plot of perplexity relative to the original against parameters. {words}.",
        "The numbers are those of the table; lower and further left is better. Filled: no other result is both smaller "
        "and better. Lines are 95 % paired bootstrap intervals." + (" The scale is logarithmic." if crowded else ""),
        height=300 + 16 * ((len(kinds) + 1) // 2 if len(kinds) > 1 else 0),
        paint=paint,
    )


def undominated(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point beats in both size and perplexity."""
    places = [(point.share, point.ratio.value) for point in points]
    return [point for point, place in zip(points, places, strict=True) if not any(beats(p, place) for p in places)]


def _at_one_place(points: Sequence[Point]) -> dict[tuple[float, float], str]:
    """Return the numbers of the points at each place, so that equal results do not hide each other's."""
    places: dict[tuple[float, float], list[str]] = {}
    for point in points:
        places.setdefault((round(point.share, 1), round(point.ratio.value, 3)), []).append(str(point.number))
    return {place: ", ".join(numbers) for place, numbers in places.items()}
