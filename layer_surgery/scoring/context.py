"""The input of a scorer, and the registry of scorers."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import KW_ONLY, dataclass

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.config.choices import SCORER_CHOICES
from layer_surgery.errors import NumericalError, PlanError
from layer_surgery.records import LayerScores
from layer_surgery.registry import Registry
from layer_surgery.walk.finite import remedy
from layer_surgery.walk.walk import Walk


@dataclass(frozen=True, kw_only=True)
class ScoringContext:
    """A model to walk over the calibration tokens."""

    walk: Walk
    count: int | None  #: How many layers are to go; None if only the values are asked for.
    seed: int
    statistics: StatisticsSource
    keep: float  #: Fraction of a layer's parameters that low-rank components would get; above 0.
    refit: bool = True  #: Whether a refit follows the surgery.
    keep_boundaries: bool = False
    """Whether a later stage needs all boundaries, so that a forward walk had better keep them."""

    @property
    def unit(self) -> str:
        """Unit of the mean loss."""
        return self.walk.tokens.objective.unit

    @property
    def layer_count(self) -> int:
        return self.walk.model.layer_count

    @property
    def path(self) -> list[int]:
        return list(range(self.layer_count))


@dataclass(frozen=True)
class Ranking:
    """The answer of a scorer."""

    quantity: str  #: Meaning of the values, with their unit.
    values: list[float]  #: One for each layer; higher is more important.
    order: list[int] | None = None
    """Layers in the order in which they would go, as far as was asked for; None: by their values."""


Scorer = Callable[[ScoringContext], Ranking]


@dataclass(frozen=True)
class ScorerEntry:
    """A scorer that can be chosen by name."""

    rank: Scorer
    name: str
    _: KW_ONLY
    needs_data: bool = False  #: Whether it looks at calibration data.
    moments: bool = False  #: Whether it takes second moments, of as many tokens as the model is wide or more.
    parts: bool = False  #: Whether it can rank the attention and the MLP of layers too.
    depends_on: tuple[str, ...] = ()
    """The fields of the context, apart from model, data and seed, that what it returns depends on. Where these are the
    same, one ranking serves several compressions."""

    @property
    def source(self) -> str:
        """URL of the paper, or "" where there is none."""
        return SCORER_CHOICES[self.name].source

    def scores(self, context: ScoringContext) -> LayerScores:
        """Rank the layers."""
        ranking = self.rank(context)
        values = ranking.values
        bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            raise NumericalError(
                f"the score of layer {bad} by --scorer {self.name} is not finite ({values[bad]}); "
                f"{remedy(context.walk.model.dtype)}."
            )
        by_value = sorted(range(len(values)), key=lambda index: (values[index], -index))  # of equals the deeper first
        return LayerScores(
            scorer=self.name,
            source=self.source,
            quantity=ranking.quantity,
            values=values,
            removal_order=by_value if ranking.order is None else ranking.order,
            tokens=int(context.walk.all_tokens.valid.sum()) if self.needs_data else 0,
        )


def check_linears(scorer: str, linears: Mapping[int, Collection[str]]) -> None:
    """Raise `PlanError` if a scorer that takes second moments finds a layer without a linear to take them of."""
    without = [index for index, names in linears.items() if not names]
    if SCORERS[scorer].moments and without:
        raise PlanError(
            f"--scorer {scorer} needs linears that can be replaced, and layers {without} have none; use another, such "
            "as --scorer block_influence."
        )


SCORERS = Registry("scorer", ScorerEntry, SCORER_CHOICES)
