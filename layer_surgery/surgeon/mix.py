"""One search over the layers: what of each attention and MLP is kept, and how, in one currency.

Every kind of component (`components/`) prices what it offers in nats per token, and in what the budgets limit. So one
search (`division.py`) divides the budgets among channels of MLPs, singular vectors of linears, heads and whole parts;
what it has chosen is written from the statistics (singular vectors) and by `narrow.py` (everything else).
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from layer_surgery.calibration.statistics import Statistics, replaceable_linears, useful_rank
from layer_surgery.checkpoint.architectures import Architecture
from layer_surgery.checkpoint.size_fields import plain_kinds
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.surgeon.components.whole import GONE
from layer_surgery.surgeon.context import METHODS, SurgeryContext
from layer_surgery.surgeon.division import find
from layer_surgery.surgeon.narrow import narrow
from layer_surgery.surgeon.plan import ModelShape, plan_parameters
from layer_surgery.surgeon.remove import without_parts
from layer_surgery.surgeon.search import Choice
from layer_surgery.surgeon.shape import model_shape


@METHODS.add(
    "mix",
    needs_data=True,
    moments=True,
    needs_boundaries=True,
    refits=True,
    searches=True,
)
def mix(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Keep what is worth most nats within the budgets in the layers of the plan; return the plan with what that is.

    What the user gave (`context.ranks_fixed`) is kept as it is.
    """
    checkpoint, statistics_of = context.model.checkpoint, context.statistics
    shape = model_shape(checkpoint, statistics_of.part)
    planned = {layer.index: layer for layer in plan.smaller}
    sizes = {index: replaceable_linears(context.model, index, statistics_of.part) for index in planned}
    most = {
        index: {name: max(useful_rank(size), planned[index].ranks.get(name, 0)) for name, size in linears.items()}
        for index, linears in sizes.items()
    }
    if not planned or all(layer.action == "low_rank" and not any(layer.ranks.values()) for layer in plan.smaller):
        return without_parts(plan, context)
    statistics = statistics_of.get(context.walk, most)
    if not context.ranks_fixed:
        plan = _searched(plan, shape, statistics, context)
    without_parts(plan, context)
    for layer in context.unfinished(plan.low_rank, lambda layer: f"{layer.index} low-rank"):
        ranks = {name: rank for name, rank in layer.ranks.items() if rank}
        with context.divided(dict.fromkeys(ranks, 1.0)) as names:
            for name, factors in statistics.factors(layer.index, {name: ranks[name] for name in names}).items():
                values = statistics.values[layer.index][name]
                context.write(layer.index, name, factors, "fisher", values, ranks[name])
    narrow(plan, shape, statistics, context)
    return plan


def _searched(plan: SurgeryPlan, shape: ModelShape, statistics: Statistics, context: SurgeryContext) -> SurgeryPlan:
    """Return the plan with the best mix within its bounds."""
    architecture = context.model.architecture
    plain = plain_kinds(context.model.checkpoint) if context.search.uniform else ()
    found = find(plan, shape, architecture, context.search, context.pricing, statistics, plain)
    layers = [
        _layer_plan(layer, shape, architecture, found.choices) if layer.action in ("low_rank", "reduce") else layer
        for layer in plan.layers
    ]
    removed = any(layer.action == "remove" for layer in plan.layers)
    plan = replace(
        plan,
        layers=layers,
        target_layers=sum(layer.action == "keep" for layer in layers),
        predicted_loss_rise=None if removed else round(found.cost, 6),
        predicted_loss_bound=None if removed else round(found.cost - found.gap, 6),
    )
    return replace(plan, parameters=plan_parameters(shape, plan))


def _layer_plan(
    layer: LayerPlan, shape: ModelShape, architecture: Architecture, choices: Mapping[str, Choice]
) -> LayerPlan:
    """Return what the search has chosen for a layer."""
    linears = shape.layers[layer.index].linears
    ranks: dict[str, int] = {}
    units: dict[str, int] = {}
    for part, names in (("attention", architecture.attention), ("mlp", architecture.mlp)):
        choice = choices.get(f"{layer.index} {part}")
        if choice is None:
            continue
        if choice.kind == "singular":
            ranks |= {name: rank for name, rank in choice.steps.items() if rank < math.prod(linears[name])}
        elif choice.kind == GONE:
            ranks |= {name: 0 for name in names if name in linears}
        elif choice.kind in ("channels", "heads", "bypass"):
            (units[choice.kind],) = choice.steps.values()
    of_experts = choices.get(f"{layer.index} experts")
    if of_experts is not None and of_experts.kind in ("experts", "routed"):
        (units[of_experts.kind],) = of_experts.steps.values()
    if not ranks and not units:
        return LayerPlan(index=layer.index, action="keep")
    return LayerPlan(index=layer.index, action="reduce" if units else "low_rank", ranks=ranks, **units)
