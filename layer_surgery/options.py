"""Keyword arguments that several functions of the Python interface take, and the configurations they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from layer_surgery.config import ContinuationConfig, EvaluationConfig, RuntimeConfig, SpeedConfig, TaskConfig


class RuntimeOptions(TypedDict, total=False):
    """Keyword arguments of every function here; see `RuntimeConfig` for what they mean and their defaults."""

    device: str | torch.device
    dtype: str | torch.dtype
    seed: int
    batch_size: int
    trust_remote_code: bool
    resident_bytes: int | None
    boundary_bytes: int | None
    scratch: str | Path | None
    cache: str | Path | None
    memory_limit: int | None


class EvaluationOptions(TypedDict, total=False):
    """What is measured beside perplexity; see `EvaluationConfig` and its parts for what is meant and the defaults."""

    distance: bool
    tasks: str | Sequence[str]
    task_path: str | Path | Sequence[str | Path]
    num_fewshot: int | None
    limit: int | None
    speed: bool
    speed_batch_sizes: Sequence[int]
    speed_lengths: Sequence[int]
    speed_new_tokens: int
    speed_repeats: int
    continuations: int | None
    prompts: str | Sequence[str]


class Options(RuntimeOptions, EvaluationOptions, total=False):
    """Keyword arguments of the functions that evaluate."""


def runtime_config(options: Any) -> RuntimeConfig:
    """Take the options that are of the runtime, and torch's own devices and dtypes too."""
    plain: dict[str, Any] = {name: value for name, value in options.items() if name not in _EVALUATION_NAMES}
    for name in ("device", "dtype"):
        if name in plain:
            plain[name] = str(plain[name]).removeprefix("torch.")
    for name in ("scratch", "cache"):
        if plain.get(name) is not None:
            plain[name] = Path(plain[name]).expanduser()
    return RuntimeConfig(**plain)


def names_of(sources: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    """Return one source, or several, or None, as names."""
    return tuple(map(str, [sources] if isinstance(sources, str | Path) else sources or ()))


_EVALUATION_NAMES = EvaluationOptions.__annotations__.keys()
#: Options of the measurement of speed, and their fields in `SpeedConfig`.
_SPEED = {
    "speed": "measure",
    "speed_batch_sizes": "batch_sizes",
    "speed_lengths": "prompt_lengths",
    "speed_new_tokens": "new_tokens",
    "speed_repeats": "repeats",
}


def evaluation_config(
    sources: str | Path | Sequence[str | Path] | None,
    column: str | None,
    sequence_length: int,
    windows: int | None,
    options: Options,
) -> EvaluationConfig:
    """Take the options that say what is measured."""
    speed = {field: _one_or_tuple(options[name]) for name, field in _SPEED.items() if name in options}  # type: ignore[literal-required]
    return EvaluationConfig(
        sources=names_of(sources),
        column=column,
        sequence_length=sequence_length,
        max_windows=windows,
        distance=options.get("distance", EvaluationConfig.distance),
        tasks=TaskConfig(
            names=tuple(several(options.get("tasks"))),
            paths=tuple(Path(path).expanduser() for path in several(options.get("task_path"))),
            num_fewshot=options.get("num_fewshot"),
            limit=options.get("limit"),
        ),
        speed=SpeedConfig(**speed),
        continuations=ContinuationConfig(
            count=options.get("continuations"), prompts=tuple(several(options.get("prompts")))
        ),
    )


def several(value: Any) -> Sequence[Any]:
    """Return one value, or several, or None, as a sequence."""
    return [value] if isinstance(value, str | Path | int | float) else list(value or ())


def _one_or_tuple(value: Any) -> Any:
    return value if isinstance(value, bool | int) else tuple(value)
