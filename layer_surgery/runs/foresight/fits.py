"""What does not fit is refused, with the options that would make it fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from layer_surgery.errors import UserError
from layer_surgery.linalg.decomposition import takes_leading
from layer_surgery.records.foresight import Foresight, StageForesight
from layer_surgery.runs.foresight.sizes import Sizes


@dataclass(frozen=True)
class Place:
    """A folder, and what is to be written into it."""

    title: str
    path: Path
    bytes: int


def check_memory(
    found: Foresight,
    sizes: Sizes,
    available: int | None,
    peak_with: Callable[[Sizes], list[StageForesight]],
    more: Sequence[str] = (),
) -> None:
    """Raise `UserError` if a stage takes more than there is.

    Args:
        peak_with: gives the stages for other settings.
        more: what else would make it fit (see `too_much_memory`).
    """
    if available is None or found.memory_bytes <= available:
        return
    remedies = [
        option
        for option, other in _other_settings(sizes, available)
        if max(stage.memory_bytes for stage in peak_with(other)) <= available
    ]
    rest = [stage for stage in found.stages if stage.name != "refit"]
    if _worst(found).name == "refit" and max(stage.memory_bytes for stage in rest) <= available:
        remedies.append("--no-refit")
    raise too_much_memory(found, available, [*remedies, *(each for each in more if each not in remedies)])


def too_much_memory(found: Foresight, available: int, remedies: Sequence[str]) -> UserError:
    """Return the error for what takes more memory than there is.

    Args:
        remedies: options each of which makes it fit by itself; those to be left out have a `no ` before them.
    """
    given = [words for words in remedies if not words.startswith("no ")]
    left = [f"leave out {words.removeprefix('no ')}" for words in remedies if words.startswith("no ")]
    advice = "".join(f"{words}, or " for words in [*([f"pass {' or '.join(given)}"] if given else []), *left])
    worst = _worst(found)
    largest = max(worst.parts, key=lambda part: worst.parts[part])
    return UserError(
        f"{worst.title} would take about {worst.memory_bytes:,} bytes of memory ({worst.parts[largest]:,} of them for "
        f"{largest}), but --memory-limit (or what is free) is {available:,}; {advice}raise --memory-limit on a machine "
        "that has more."
    )


def _worst(found: Foresight) -> StageForesight:
    return max(found.stages, key=lambda stage: stage.memory_bytes)


def _other_settings(sizes: Sizes, available: int) -> Iterator[tuple[str, Sizes]]:
    """Yield single options that take less memory, with the sizes that they come to."""
    less = {"resident_bytes": min(sizes.resident_bytes, available // 2)}
    less |= {
        "boundary_bytes": min(sizes.boundary_bytes, available // 4),
        "ahead_bytes": min(sizes.ahead_bytes, available // 8),
    }
    if any(value < getattr(sizes, name) for name, value in less.items()):
        yield f"--memory-limit {available}", sizes.with_(**less)
    batch = sizes.batch_size // 2
    while batch:
        yield f"--batch-size {batch}", sizes.with_(batch_size=batch)
        batch //= 2
    if sizes.dtype.itemsize > 2:
        yield "--dtype bfloat16", sizes.with_(dtype=torch.bfloat16)
    sides = [side for layer in sizes.layers for size in layer.linears.values() for side in size]
    if sides and not takes_leading(sizes.decomposition, max(sides)):
        yield "--decomposition leading", sizes.with_(decomposition="leading")


def check_disk(places: Sequence[Place], advice: str) -> None:
    """Raise `UserError` if what is written does not fit on its disks; `advice` is what else there is to do."""
    disks = dict[int, list[Place]]()
    for place in places:
        if place.bytes:
            disks.setdefault(existing(place.path).stat().st_dev, []).append(place)
    for together in disks.values():
        path = together[-1].path
        needed, free = sum(place.bytes for place in together), shutil.disk_usage(existing(path)).free
        if needed > free:
            raise UserError(
                f"{' and '.join(place.title for place in together)} would take up to {needed:,} bytes, but the disk of "
                f"{path} has {free:,} free; make room, {advice}."
            )


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())
