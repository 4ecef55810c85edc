"""Truncated SVD in the metric of the task loss: activations on one side, loss gradients on the other.

The Kronecker-factored Fisher metric is that of Martens & Grosse (https://arxiv.org/abs/1503.05671), in SVD compression
GFWSVD (https://arxiv.org/abs/2505.17974).
"""

from collections.abc import Mapping
from dataclasses import replace

from layer_surgery.calibration.statistics import replaceable_linears, useful_rank
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext
from layer_surgery.surgeon.remove import without_parts


@METHODS.add(
    "fisher",
    needs_data=True,
    moments=True,
    needs_boundaries=True,
    refits=True,
)
def fisher_svd(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Keep the components that are worth most nats per parameter; return the plan with the ranks that this gives.

    Ranks that the user gave (`context.ranks_fixed`) are kept as they are.
    """
    if not any(rank for layer in plan.low_rank for rank in layer.ranks.values()):
        return without_parts(plan, context)
    planned = {layer.index: layer.ranks for layer in plan.low_rank}
    sizes = {index: replaceable_linears(context.model, index) for index in planned}
    most = {
        index: {name: max(rank, useful_rank(sizes[index][name])) for name, rank in ranks.items()}
        for index, ranks in planned.items()
    }
    statistics = context.statistics.get(context.walk, most)
    ranks: Mapping[int, Mapping[str, int]] = planned
    if not context.ranks_fixed:
        spendable = _cost(planned, sizes) + plan.parameter_bound - plan.parameters
        ranks = statistics.best_ranks(planned, spendable)
    for index in context.unfinished(ranks, str):
        with context.divided(dict.fromkeys(ranks[index], 1.0)) as names:
            for name, factors in statistics.factors(index, {name: ranks[index][name] for name in names}).items():
                context.write(index, name, factors, "fisher", statistics.values[index][name], ranks[index][name])
    layers = [replace(layer, ranks=dict(ranks.get(layer.index, {}))) for layer in plan.layers]
    # The prediction knows neither layers removed outright nor plans of which other linears than usual are low-rank.
    usual = {index: replaceable_linears(context.model, index, context.statistics.part) for index in ranks}
    unknown = any(layer.action == "remove" for layer in plan.layers) or any(
        ranks[index].keys() != usual[index].keys() for index in ranks
    )
    whole = sum(out * in_ for index in ranks for out, in_ in usual[index].values())
    predicted = statistics.couplings.cost(list(ranks), _cost(ranks, sizes) / whole)
    return replace(
        plan,
        layers=layers,
        parameters=plan.parameters + _cost(ranks, sizes) - _cost(planned, sizes),
        predicted_loss_rise=None if unknown else round(predicted, 6),
    )


def _cost(ranks: Mapping[int, Mapping[str, int]], sizes: Mapping[int, Mapping[str, tuple[int, int]]]) -> int:
    """Return the parameters of all factors."""
    return sum(rank * sum(sizes[index][name]) for index in ranks for name, rank in ranks[index].items())
