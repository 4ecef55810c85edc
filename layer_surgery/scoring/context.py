"""The input of a scorer, and the registry of scorers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.records import LayerScores
from layer_surgery.registry import Registry
from layer_surgery.walk.walk import Walk


@dataclass(frozen=True, kw_only=True)
class ScoringContext:
    """A model to walk over the calibration tokens."""

    walk: Walk
    count: int | None
    """How many layers are to go; None if only the values are asked for."""
    seed: int
    statistics: StatisticsSource
    keep: float
    """Fraction of a layer's parameters that low-rank components would get; above 0."""
    refit: bool = True
    """Whether a refit follows the surgery."""
    keep_boundaries: bool = False
    """Whether a later stage needs all boundaries, so that a forward walk had better keep them."""

    @property
    def layer_count(self) -> int:
        return self.walk.model.layer_count

    @property
    def path(self) -> list[int]:
        return list(range(self.layer_count))

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return int(self.walk.tokens.valid.sum())

    def generator(self) -> torch.Generator:
        """A generator seeded with the user's seed."""
        return torch.Generator().manual_seed(self.seed)


Scorer = Callable[[ScoringContext], LayerScores]


@dataclass(frozen=True)
class ScorerEntry:
    """A scorer that can be chosen by name."""

    function: Scorer
    name: str
    summary: str = field(kw_only=True)
    """One line for help texts."""
    source: str = field(default="", kw_only=True)
    """URL of the paper, or "" where there is none."""
    needs_data: bool = field(default=False, kw_only=True)
    """Whether it looks at calibration data."""
    parts: bool = field(default=False, kw_only=True)
    """Whether it can rank the attention and the MLP of layers too."""
    depends_on: tuple[str, ...] = field(default=(), kw_only=True)
    """The fields of the context, apart from model, data and seed, that what it returns depends on. Where these are the
    same, one ranking serves several compressions."""


SCORERS = Registry("scorer", ScorerEntry)


def least_first(values: Iterable[float]) -> list[int]:
    """Return indices by ascending value; equal values by descending index (the deeper layer goes first)."""
    numbered = list(enumerate(values))
    return [index for index, _value in sorted(numbered, key=lambda item: (item[1], -item[0]))]
