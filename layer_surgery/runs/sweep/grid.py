"""The points of a sweep: every combination of its options, each once, and each as the compression that it is."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import attrs

from layer_surgery.config import CompressConfig, SweepConfig
from layer_surgery.records.sweep import SweepSettings
from layer_surgery.runs.planning import checked
from layer_surgery.surgeon import METHODS


def grid(config: SweepConfig) -> list[SweepSettings]:
    """Return the points in their fixed order. Methods that keep nothing have one point for all `--keep`.

    Raises `UserError` for what no model allows: unknown names, fractions outside of 0 to 1, options that do not go
    together.
    """
    points: set[SweepSettings] = set()
    for target, keep, method, scorer in product(config.target_layers, config.keep, config.method, config.scorer):
        entry = METHODS[method]
        point = SweepSettings(
            target_layers=target,
            keep=0.0 if entry.removes else float(keep),
            method=entry.name,
            scorer=scorer,
            refit=entry.refits if config.refit is None else config.refit,
        )
        checked(compress_config(config, point))
        points.add(point)
    return in_order(points)


def in_order(points: Iterable[SweepSettings]) -> list[SweepSettings]:
    """Return points by size, the largest first; then by name."""
    return sorted(points, key=lambda p: (-p.target_layers, -p.keep, p.method, p.scorer, p.refit))


def compress_config(config: SweepConfig, point: SweepSettings) -> CompressConfig:
    """Return the compression that gives this point's model; without an output."""
    own = {"target_layers", "keep", "method", "scorer", "refit", "output", "overwrite"}
    known = {field.name for field in attrs.fields(SweepConfig)} - own
    shared = {field.name: getattr(config, field.name) for field in attrs.fields(CompressConfig) if field.name in known}
    return CompressConfig(
        target_layers=point.target_layers,
        keep=None if METHODS[point.method].removes else point.keep,
        method=point.method,
        scorer=point.scorer,
        refit=point.refit,
        no_save=True,
        **shared,
    )


def same_surgery(point: SweepSettings) -> SweepSettings:
    """Return what points have in common that give the same model: with nothing kept, methods that do nothing but keep
    components differ in name only."""
    removes = METHODS[point.method].removes
    return point if point.keep or removes else replace(point, method="remove")
