"""The smallest model that is good enough: `perplexity<=1.1x` and the like."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from layer_surgery.config import EvaluationConfig
from layer_surgery.errors import UserError, nearest_name
from layer_surgery.records.sweep import SweepBest, SweepPoint

Quantity = Literal["perplexity", "kl_divergence", "top1_agreement"]
#: Whether less of it is better.
QUANTITIES: dict[Quantity, bool] = {"perplexity": True, "kl_divergence": True, "top1_agreement": False}
#: Least and greatest value that each can have.
RANGES: dict[Quantity, tuple[float, float]] = {
    "perplexity": (1.0, math.inf),
    "kl_divergence": (0.0, math.inf),
    "top1_agreement": (0.0, 1.0),
}
_FORM = re.compile(r"\s*([\w-]+)\s*(<=|>=|<|>|=)\s*([0-9.eE+-]+)\s*(x?)\s*")


@dataclass(frozen=True)
class Condition:
    """A bound on one measured quantity."""

    text: str
    quantity: Quantity
    bound: float
    strict: bool  #: Whether the bound itself is not good enough.
    relative: bool  #: Whether the bound is a multiple of the original's value.

    def value(self, point: SweepPoint) -> float | None:
        """Return what the condition is about; with several texts the mean over them, of perplexities the geometric.

        None if it was not measured.
        """
        if self.relative:
            return point.perplexity_ratio
        if self.quantity == "perplexity":
            measured = point.result.perplexity if point.result is not None else {}
            return math.exp(fmean([math.log(each.value) for each in measured.values()])) if measured else None
        found: Mapping[str, Any] = getattr(point.comparison, self.quantity, {}) if point.comparison else {}
        values = [each.mean if self.quantity == "kl_divergence" else each.value for each in found.values()]
        return fmean(values) if values else None

    def miss(self, value: float) -> float:
        """Return by how much a value is on the wrong side of the bound; 0 or less is good enough, but for `strict`."""
        return value - self.bound if QUANTITIES[self.quantity] else self.bound - value

    def holds(self, value: float) -> bool:
        """Whether a value is good enough."""
        return self.miss(value) < 0 if self.strict else self.miss(value) <= 0


def parse_condition(text: str, evaluation: EvaluationConfig) -> Condition:
    """Read `QUANTITY<=NUMBER`; raises `UserError` for what it is not, and for what is not going to be measured."""
    match = _FORM.fullmatch(text)
    try:
        name, sign, number, times = match.groups() if match else ("", "", "", "")
        bound = float(number)
    except ValueError:
        raise UserError(
            f"--best is '{text}'; give a quantity and a bound, for example 'perplexity<=1.1x' (times the original's), "
            "'perplexity<=20', 'kl_divergence<=0.05' or 'top1_agreement>=0.9'."
        ) from None
    quantity = next((known for known in QUANTITIES if known == name.replace("-", "_")), None)
    if quantity is None:
        raise UserError(
            f"--best is '{text}', but '{name}' is no quantity to bound.{nearest_name(name, QUANTITIES)} Known: "
            f"{', '.join(QUANTITIES)}."
        )
    better = "<" if QUANTITIES[quantity] else ">"
    if sign[0] != better:
        raise UserError(f"--best is '{text}', but a good {quantity} is bounded with {better}=.")
    if times and quantity != "perplexity":
        raise UserError(f"--best is '{text}', but only perplexity is compared with the original's; leave out the x.")
    if not math.isfinite(bound):
        raise UserError(f"--best is '{text}'; give a finite number.")
    low, high = (0.0, math.inf) if times else RANGES[quantity]
    if not low <= bound <= high:
        allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
        raise UserError(f"--best is '{text}', but no model has such a {quantity}; allowed: {allowed}.")
    if not evaluation.eval_data or (quantity != "perplexity" and not evaluation.distance):
        option = "--no-distance" if evaluation.eval_data else "--no-eval"
        raise UserError(f"--best is '{text}', but {quantity} is not measured with {option}; leave that out.")
    return Condition(text, quantity, bound, strict=sign in "<>", relative=bool(times))


def find_best(condition: Condition, points: Sequence[SweepPoint]) -> SweepBest:
    """Return the point with fewest parameters that satisfies the condition (of equals the better), or the nearest."""
    known = [
        (point, value, point.parameters)
        for point in points
        if point.status == "done" and point.parameters is not None and (value := condition.value(point)) is not None
    ]
    best = SweepBest(condition=condition.text, point=None, nearest=None, value=None, output=None)
    good = [each for each in known if condition.holds(each[1])]
    if good:
        point, value, _ = min(good, key=lambda each: (each[2], condition.miss(each[1])))
        return replace(best, point=point.settings, value=value)
    if known:
        point, value, _ = min(known, key=lambda each: (condition.miss(each[1]), each[2]))
        return replace(best, nearest=point.settings, value=value)
    return best
