"""Figures about healing: how the losses went, and the loss on text that was not trained on."""

from collections.abc import Iterator

from matplotlib.figure import Figure

from layer_surgery.records import CurvePoint, HealingRecord, SurgeryReport
from layer_surgery.reporting.derived import items_of, loss_unit
from layer_surgery.reporting.figures.svg import INK, MUTED, SERIES, Plot, draw

#: Legends of the texts that are watched.
_TEXTS = {"validation": "held-out text", "general": "general text"}


def curves(report: SurgeryReport) -> Iterator[Plot]:
    """Yield the curves of a healing, if there was one with more than its first point."""
    if report.healing is None or len(report.healing.curve) < 2:
        return
    unit = loss_unit(report)
    yield _validation(report.healing, unit)
    yield _losses(report.healing, items_of(unit))


def _validation(healing: HealingRecord, unit: str) -> Plot:
    """Return the change of the loss on each text that was watched, against the tokens (or examples) trained on."""
    items = items_of(unit)
    points, first = healing.curve, healing.curve[0].validation
    series = {name: [point.validation[name] - value for point in points] for name, value in first.items()}
    chosen = next((point for point in points if point.step == healing.best_step), None)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for (name, values), (colour, marker) in zip(series.items(), SERIES, strict=False):
            axes.plot(
                _thousands(points), values, marker=marker, markersize=5, color=colour, label=_TEXTS.get(name, name)
            )
        axes.axhline(0, color=INK, linewidth=1.2)
        if chosen is not None:
            axes.axvline(chosen.tokens / 1e3, color=MUTED, linewidth=1.2, linestyle="--")
        axes.set_xlabel(f"thousand {items} trained on")
        axes.set_ylabel(f"change of the loss, {unit}")
        figure.legend(loc="outside upper left", ncols=2)

    ends = "; ".join(f"{_TEXTS.get(name, name)} {values[-1]:+.4f}" for name, values in series.items())
    line = "The dashed line is where the weights of the result are from. " if chosen is not None else ""
    return draw(
        "healing-validation",
        "Healing: text that was not trained on",
        f"Lines against {items}, in {unit}; at the end: {ends}.",
        f"Below 0 is better than before healing. {line}",
        height=280,
        paint=paint,
    )


def _losses(healing: HealingRecord, items: str) -> Plot:
    """Return the losses that were made small, each as a share of its first value."""
    points = [point for point in healing.curve if point.losses]
    names = list(points[0].losses)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for name, (colour, marker) in zip(names, SERIES, strict=False):
            first = points[0].losses[name]
            values = [100 * point.losses[name] / first for point in points] if first else [0.0] * len(points)
            axes.plot(_thousands(points), values, marker=marker, markersize=5, color=colour, label=name)
        axes.set_xlabel(f"thousand {items} trained on")
        axes.set_ylabel("mean loss, % of the first")
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=min(4, len(names)))

    firsts = "; ".join(f"{name} {points[0].losses[name]:.4g} to {points[-1].losses[name]:.4g}" for name in names)
    return draw(
        "healing-losses",
        "Healing: what was made small",
        f"Lines against {items}. From the first to the last point: {firsts}.",
        f"Each point is the mean since the one before. From the first to the last: {firsts}.",
        height=280,
        paint=paint,
    )


def _thousands(points: list[CurvePoint]) -> list[float]:
    return [point.tokens / 1e3 for point in points]
