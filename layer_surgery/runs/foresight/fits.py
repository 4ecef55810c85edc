"""What does not fit is refused, with the options that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from layer_surgery.errors import UserError
from layer_surgery.linalg.decomposition import takes_leading
from layer_surgery.records.foresight import Foresight, StageForesight
from layer_surgery.runs.foresight.sizes import Sizes


def check_memory(
    found: Foresight, sizes: Sizes, available: int | None, peak_with: Callable[[Sizes], list[StageForesight]]
) -> None:
    """Raise `UserError` if a stage takes more than there is; `peak_with` gives the stages for other settings."""
    if available is None or found.memory_bytes <= available:
        return
    worst = max(found.stages, key=lambda stage: stage.memory_bytes)
    remedies = [
        option
        for option, other in _other_settings(sizes, available)
        if max(stage.memory_bytes for stage in peak_with(other)) <= available
    ]
    rest = [stage for stage in found.stages if stage.name != "refit"]
    if worst.name == "refit" and max(stage.memory_bytes for stage in rest) <= available:
        remedies.append("--no-refit")
    advice = f"pass {' or '.join(remedies)}, or " if remedies else ""
    largest = max(worst.parts, key=lambda part: worst.parts[part])
    raise UserError(
        f"{worst.title} would take about {worst.memory_bytes:,} bytes of memory ({worst.parts[largest]:,} of them for "
        f"{largest}), but --memory-limit (or what is free) is {available:,}; {advice}raise --memory-limit on a machine "
        "that has more."
    )


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


def check_disk(found: Foresight, output: Path | None, scratch: Path) -> None:
    """Raise `UserError` if the result or the scratch files do not fit on their disks."""
    same = output is not None and _device(output) == _device(scratch)
    needed = found.scratch_bytes + (found.output_bytes if same else 0)
    if needed > found.scratch_free_bytes:
        what = "scratch files and the result" if same else "scratch files"
        raise UserError(
            f"{what} would take up to {needed:,} bytes, but the disk of {scratch} has {found.scratch_free_bytes:,} "
            "free; make room, choose an --output on another disk, or lower --samples."
        )
    if output is not None and found.output_bytes > found.output_free_bytes:
        raise UserError(
            f"the result would take {found.output_bytes:,} bytes, but the disk of --output {output} has "
            f"{found.output_free_bytes:,} free; make room or choose another --output."
        )


def existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def _device(path: Path) -> int:
    return existing(path).stat().st_dev
