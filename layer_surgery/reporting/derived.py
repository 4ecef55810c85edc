"""Lists and ratios that more than one view takes from a record."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from layer_surgery.checkpoint.heads import CAUSAL_LM, HEADS, Head
from layer_surgery.records import (
    UNITS,
    EvaluationResult,
    LayerPlan,
    LayerScores,
    SpectrumRecord,
    SurgeryPlan,
    SurgeryReport,
)
from layer_surgery.reporting.formats import short_names


class ChangedLayers(NamedTuple):
    """Indices of the layers that a plan does not leave whole, by what is done to them."""

    removed: list[int]
    parts_removed: list[int]  #: Layers of which only linears of rank 0 are not whole.
    low_rank: list[int]  #: All others with linears of a lower rank.
    narrowed: list[int]
    """Layers with fewer channels or heads, or with fewer channels in their experts; they may have linears of a lower
    rank too, as those below."""
    fewer_experts: list[int]
    bypassed: list[int]  #: Layers with a linear map in the place of their MLP.


def changed_layers(plan: SurgeryPlan) -> ChangedLayers:
    """Return which layers a plan changes, and how."""
    parts_removed = [layer.index for layer in plan.smaller if not any(layer.kept.values())]
    return ChangedLayers(
        removed=[layer.index for layer in plan.layers if layer.action == "remove"],
        parts_removed=parts_removed,
        low_rank=[layer.index for layer in plan.low_rank if layer.index not in parts_removed],
        narrowed=[layer.index for layer in plan.smaller if layer.units.keys() - {"routed", "bypass"}],
        fewer_experts=[layer.index for layer in plan.smaller if layer.routed is not None],
        bypassed=[layer.index for layer in plan.smaller if layer.bypass is not None],
    )


def kept_columns(plan: SurgeryPlan) -> dict[str, str]:
    """Return what is kept in part in some layer, linears and units: full names, and short names for headings."""
    names = list(dict.fromkeys(name for layer in plan.smaller for name in layer.kept))
    names.sort(key=lambda name: name in UNITS)
    return dict(zip(names, short_names(names), strict=True))


def kept_count(layer: LayerPlan, name: str, spectra: Sequence[SpectrumRecord]) -> str:
    """Return what a layer keeps of a linear or unit, "" if all of it; of heads also of how many, where spectra tell."""
    if name not in layer.kept:
        return ""
    known = [record.total for record in spectra if record.layer == layer.index and record.units == name == "heads"]
    return f"{layer.kept[name]} of {known[0]}" if known else str(layer.kept[name])


def main_tasks(result: EvaluationResult) -> list[str]:
    """Return the groups of tasks, or all tasks where there is no group."""
    return [name for name, task in result.tasks.items() if task.group] or list(result.tasks)


class SpeedChange(NamedTuple):
    """Speed at the first batch size and prompt length, in tokens per second."""

    word: str  #: `decoding`, or `throughput` of a model that generates nothing.
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after / self.before


def speed_change(before: EvaluationResult, after: EvaluationResult) -> SpeedChange | None:
    """Return the speed that counts most; None if it was not measured."""
    if not (before.speed and after.speed):
        return None
    old, new = before.speed[0], after.speed[0]
    if old.decode_tokens_per_second and new.decode_tokens_per_second is not None:
        return SpeedChange("decoding", old.decode_tokens_per_second, new.decode_tokens_per_second)
    if not old.new_tokens and old.prefill_tokens_per_second:
        return SpeedChange("throughput", old.prefill_tokens_per_second, new.prefill_tokens_per_second)
    return None


def head_of(base_model: dict[str, Any]) -> Head:
    """Return the head of the original that a record tells of; records of causal language models do not name it."""
    return HEADS.get(base_model.get("head", CAUSAL_LM.kind), CAUSAL_LM)


class RankedLayer(NamedTuple):
    """A layer in a ranking."""

    goes: str  #: The place in which it would go, or "stays".
    layer: int
    value: float


def ranked(scores: LayerScores) -> list[RankedLayer]:
    """Return the layers in the order in which they would go, then the others, the least important first."""
    ascending = sorted(range(len(scores.values)), key=lambda index: scores.values[index])
    order = scores.removal_order
    going = [RankedLayer(str(place), index, scores.values[index]) for place, index in enumerate(order, start=1)]
    staying = [RankedLayer("stays", index, scores.values[index]) for index in ascending if index not in order]
    return [*going, *staying]


def is_joint(scores: LayerScores) -> bool:
    """Whether the order is not that of the values, because it looks at layers together."""
    order = [scores.values[index] for index in scores.removal_order]
    return order != sorted(order)


def loss_unit(report: SurgeryReport) -> str:
    """Return the unit of the loss of the model's head."""
    return str(report.base_model.get("loss_unit", "nats per token"))


def items_of(unit: str) -> str:
    """Return what a loss is per, in the plural: "nats per masked token" is of "masked tokens"."""
    return f"{unit.rpartition(' per ')[2]}s"
