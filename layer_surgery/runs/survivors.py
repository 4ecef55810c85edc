"""Layers that stay when others are removed: whether they stay what they are, and which layers can go if not all can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.config import BudgetConfig
from layer_surgery.errors import PlanError
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.surgeon import make_plan, model_shape
from layer_surgery.walk.self_check import check_survivors
from layer_surgery.walk.streamed import StreamedModel


def check_what_stays(model: StreamedModel, plan: SurgeryPlan) -> None:
    """Raise `PlanError` if layers that stay are changed by the going of others, before anything is computed."""
    if len(plan.surviving) == len(plan.layers):
        return
    whole = {layer.index: LayerPlan(index=layer.index, action="keep") for layer in plan.smaller}
    kept = [whole.get(layer.index, layer) for layer in plan.layers]
    rest = result_checkpoint(model.checkpoint, replace(plan, layers=kept))
    survivors = StreamedModel(rest, device=model.device, dtype=model.dtype)
    check_survivors(model, survivors, plan.surviving)


def first_removable(model: StreamedModel, order: Sequence[int], count: int, note: Callable[[str], object]) -> list[int]:
    """Return the first `count` layers of a removal order that can go together, with a note if some are passed over.

    Some layers can be replaced by no other (the first of ModernBERT has no norm before its attention), and some only
    together with others (where a rule of the architecture goes by the number of a layer). If no `count` of them can go,
    the first `count` are returned, which are then refused with the reason.
    """
    first = list(order[:count])
    if _can_go(model, first):
        return first
    chosen = list[int]()
    for index in order:
        if len(chosen) < count and _can_go(model, [*chosen, index]):
            chosen.append(index)
    if len(chosen) < count:
        return first
    note(
        f"layers {sorted(first)} count least, but others would change if they were removed; removing {sorted(chosen)} "
        "in their place"
    )
    return chosen


def _can_go(model: StreamedModel, layers: Sequence[int]) -> bool:
    try:
        check_what_stays(model, make_plan(model_shape(model.checkpoint), layers, BudgetConfig(keep=0.0), "remove"))
    except PlanError:
        return False
    return True
