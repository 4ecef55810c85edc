"""Figures about layers: how important each is, which ranks were kept, and the spectra that decided it."""

from collections.abc import Iterator, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from layer_surgery.records import UNITS, SpectrumRecord, SurgeryReport
from layer_surgery.reporting.derived import kept_columns
from layer_surgery.reporting.figures.svg import BLUE, CARD, INK, ORANGE, SERIES, VERMILLION, Plot, draw
from layer_surgery.reporting.formats import ACTION_NAMES, number_list, short_names
from layer_surgery.reporting.text import plain_label

#: Colour and hatch for what is done to a layer: never the colour alone.
_ACTIONS = {
    **{"keep": (BLUE, ""), "low_rank": (ORANGE, "////"), "reduce": (ORANGE, "....")},
    "remove": (VERMILLION, "xxxx"),
}
#: Above this quotient of the largest and the smallest bar the axis is logarithmic.
_LOGARITHMIC = 30
#: Singular values below this part of the largest of their panel are left out: they are worth nothing.
_FLOOR = 3e-4
#: Panels that fit one figure.
_PANELS = 4


def layer_plots(report: SurgeryReport) -> Iterator[Plot]:
    """Yield the figures that the report has data for."""
    if report.scores is not None:
        yield importance(report)
    if any(kept for layer in report.plan.smaller for kept in layer.kept.values()):
        yield kept_ranks(report)


def importance(report: SurgeryReport) -> Plot:
    """Return a bar for each layer by the scorer's value; layers that do not stay whole have hatches."""
    scores = report.scores
    assert scores is not None
    actions = [layer.action for layer in report.plan.layers]
    positive = [value for value in scores.values if value > 0]
    logarithmic = len(positive) == len(actions) and max(positive) > _LOGARITHMIC * min(positive)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for index, (value, action) in enumerate(zip(scores.values, actions, strict=True)):
            colour, hatch = _ACTIONS[action]
            axes.bar(index, value, width=0.78, color=colour, hatch=hatch, edgecolor=CARD, linewidth=0)
        if logarithmic:
            _logarithmic(axes)
            axes.set_ylim(bottom=min(positive) / 1.6)
        axes.grid(axis="x", visible=False)
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**6) if len(actions) <= 26 * step)
        axes.set_xticks(range(0, len(actions), step))
        axes.set_xlim(-0.6, len(actions) - 0.4)
        axes.set_xlabel("layer")
        axes.set_ylabel("importance" + (" (log scale)" if logarithmic else ""))
        handles = [
            Patch(facecolor=colour, hatch=hatch, edgecolor=CARD, linewidth=0, label=name)
            for (action, name), (colour, hatch) in zip(ACTION_NAMES.items(), _ACTIONS.values(), strict=True)
            if action in actions
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, handlelength=1.6)

    order = sorted(range(len(actions)), key=lambda index: scores.values[index])
    values = ", ".join(f"{index}: {scores.values[index]:.3g}" for index in order[:100])
    return draw(
        "importance",
        "Importance of every layer",
        f"Bar chart of {scores.quantity} for {len(actions)} layers by the scorer {scores.scorer}. From the least "
        f"important: {values}.",
        f"{scores.quantity[:1].upper()}{scores.quantity[1:]}, by the scorer {scores.scorer}. Higher is more important.",
        height=235,
        paint=paint,
    )


def kept_ranks(report: SurgeryReport) -> Plot:
    """Return a table of ranks, channels and heads, shaded by the share of all (or of the largest)."""
    layers, linears = report.plan.smaller, kept_columns(report.plan)
    full = {(record.layer, record.units or record.linear): record.total for record in report.spectra}
    largest = max(kept for layer in layers for kept in layer.kept.values())
    known = all((layer.index, name) in full for layer in layers for name in layer.kept)
    shades = {
        (layer.index, name): rank / (full[layer.index, name] if known else largest)
        for layer in layers
        for name, rank in layer.kept.items()
    }
    top = max(shades.values())

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        colours = matplotlib.colormaps["cividis"]
        for row, layer in enumerate(layers):
            for column, name in enumerate(linears):
                if name not in layer.kept:
                    continue
                shade = shades[layer.index, name] / (top or 1)
                axes.add_patch(Rectangle((column - 0.47, row - 0.44), 0.94, 0.88, facecolor=colours(shade)))
                ink = "#ffffff" if shade < 0.55 else "#000000"
                axes.text(column, row, str(layer.kept[name]), ha="center", va="center", color=ink, fontsize=10)
        axes.set_xlim(-0.5, len(linears) - 0.5)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        labels = [plain_label(name, 16) for name in linears.values()]
        axes.set_xticks(range(len(linears)), labels, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(layers)), [str(layer.index) for layer in layers])
        axes.set_ylabel("layer")
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    measure = "all that there are" if known else "the largest number"
    units = [name for name in UNITS if name in linears]
    what = " and ".join([*(["ranks"] if len(units) < len(linears) else []), *units])
    return draw(
        "ranks",
        f"{what.capitalize()} that were kept",
        f"Table of ranks: rows are layers {number_list([layer.index for layer in layers])}, columns the linears "
        f"{', '.join(linears.values())}. The same numbers are in the table of layers.",
        f"The numbers are {what}. The brighter a field, the larger the share of {measure}. What has no field is whole.",
        height=75 + 25 * len(layers) + 5 * max(map(len, linears.values())),
        paint=paint,
    )


_METRICS = {
    "fisher": "Singular values in the metric of the task loss: what it costs to leave a component out grows with "
    "their square",
    "inputs": "Singular values in the metric of what each linear reads on the calibration data",
    "weight": "Singular values of the weights",
}
#: Curves of fewer points say nothing.
_LEAST_POINTS = 8


def spectra(records: Sequence[SpectrumRecord]) -> Iterator[Plot]:
    """Yield small multiples: a panel for each linear, a line for each layer, thick as far as components were kept.

    Many linears make two figures, which stand side by side where there is room.
    """
    records = [record for record in records if not record.units or record.total >= _LEAST_POINTS]
    for metric, units in dict.fromkeys((record.metric, record.units) for record in records):
        found = [record for record in records if (record.metric, record.units) == (metric, units)]
        names = list(dict.fromkeys(record.linear for record in found))
        titles = dict(zip(names, short_names(names), strict=True))
        half = len(names) if len(names) <= _PANELS else -(-len(names) // 2)
        for number, start in enumerate(range(0, len(names), half), start=1):
            part = {name: titles[name] for name in names[start : start + half]}
            yield _spectra(
                [record for record in found if record.linear in part], part, f"spectra-{units or metric}-{number}"
            )


def _spectra(records: Sequence[SpectrumRecord], titles: dict[str, str], key: str) -> Plot:
    metric, units = records[0].metric, records[0].units
    layers = sorted({record.layer for record in records})
    rows = -(-len(titles) // 2)
    scattered = any(record.kept for record in records)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(rows, 2, squeeze=False)
        for panel, (name, title) in zip(panels.flat, titles.items(), strict=False):
            _spectrum_panel(panel, [record for record in records if record.linear == name], layers)
            panel.set_title(plain_label(title, 26), loc="left")
        for panel in panels.flat[len(titles) :]:
            panel.set_visible(False)
        for panel in panels.flat[max(0, len(titles) - 2) : len(titles)]:
            panel.set_xlabel("component")
        if len(layers) <= len(SERIES):
            handles = [
                matplotlib.lines.Line2D([], [], color=colour, marker=marker, markersize=5, label=f"layer {layer}")
                for layer, (colour, marker) in zip(layers, SERIES, strict=False)
            ]
            figure.legend(handles=handles, loc="outside upper left", ncols=min(len(layers), 4), handlelength=1.8)

    shares = ", ".join(
        f"layer {record.layer} {record.linear}: {record.rank} of {record.total} ({record.kept_share:.0%})"
        for record in records[:60]
    )
    ramp = f" Lines go from dark (layer {layers[0]}) to bright (layer {layers[-1]})."
    kept = "Dots are components that were kept" if scattered else "Thick up to the dot: what was kept"
    what = f"Worth of {units}" if units else "Singular values"
    says = f"{units.capitalize()} before these linears, the first kept first: half the square is what each is worth"
    return draw(
        key,
        f"{what}, and what was kept",
        f"{what} of {len(records)} linears on logarithmic axes. Components kept, and their share of the sum of "
        f"squares: {shares}.",
        f"{says if units else _METRICS[metric]}. {kept}. Both axes are logarithmic."
        + ("" if len(layers) <= len(SERIES) else ramp),
        height=45 + 125 * rows,
        paint=paint,
    )


def _spectrum_panel(panel: Axes, records: Sequence[SpectrumRecord], layers: Sequence[int]) -> None:
    ramp = matplotlib.colormaps["cividis"]
    largest = max((record.values[0] for record in records), default=0.0)
    for record in records:
        place = layers.index(record.layer)
        if len(layers) <= len(SERIES):
            colour, marker = SERIES[place]
        else:
            colour, marker = matplotlib.colors.to_hex(ramp(0.2 + 0.65 * place / (len(layers) - 1))), "o"
        kept = record.kept or [component <= record.rank for component in record.components]
        every = zip(record.components, record.values, kept, strict=True)
        points = [point for point in every if point[1] > _FLOOR * largest]
        if not points:
            continue
        x, y, shown = zip(*points, strict=True)
        panel.plot(x, y, color=colour, linewidth=0.9)
        if record.kept:
            chosen = [(a, b) for a, b, c in points if c]
            panel.plot([a for a, _ in chosen], [b for _, b in chosen], marker, color=colour, markersize=3)
        elif any(shown):
            end = sum(shown)
            panel.plot(x[:end], y[:end], color=colour, linewidth=2.8, solid_capstyle="round")
            panel.plot(x[end - 1], y[end - 1], marker, color=colour, markersize=6, markeredgecolor=CARD)
    panel.set_xscale("log")
    if largest > 0:
        _logarithmic(panel)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_axisbelow(True)
    panel.spines["left"].set_color(INK)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
