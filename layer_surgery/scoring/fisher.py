"""Costs of layers after their best low-rank replacement, alone and together, as Fisher information predicts them."""

from layer_surgery.calibration.couplings import Couplings
from layer_surgery.calibration.statistics import useful_ranks
from layer_surgery.scoring.context import SCORERS, Ranking, ScoringContext, check_linears

#: Share of the first layer's error, in amplitude, that a refit of all later layers takes away; its cost then falls to
#: the square of what is left, 4/9. On the demo checkpoint the cost of single layers fell to 0.4, 0.5 and 0.6 for the
#: first ones and to 0.7 to 0.85 for the deeper ones (reports/task_aware/absorption.json, on development text).
ABSORBED = 1 / 3


@SCORERS.add(
    "fisher",
    needs_data=True,
    moments=True,
    parts=True,
    depends_on=("count", "keep", "refit"),
)
def predicted_cost(context: ScoringContext) -> Ranking:
    """Return the predicted cost of each layer alone; the order is greedy by the cost of all chosen so far together.

    The cost is that of a fraction `context.keep` kept: low-rank components of the method `fisher`, chosen for each
    layer by itself. See `couplings.py`. If a refit follows, the layers behind a cut make up for a part of its
    error: the share is `ABSORBED` for the first layer, going down to none for the last.
    """
    linears = useful_ranks(context.walk.model, context.path, context.statistics.part)
    check_linears("fisher", linears)
    couplings = context.statistics.get(context.walk, linears).couplings
    if context.refit:
        couplings = couplings.scaled([1 - ABSORBED * (1 - i / max(1, context.layer_count - 1)) for i in context.path])
    values = [couplings.cost([index], context.keep) for index in context.path]
    quantity = f"predicted rise of the loss with a fraction {context.keep:g} kept ({context.unit})"
    return Ranking(quantity, values, greedy_order(couplings, context.keep, context.count or context.layer_count))


def greedy_order(couplings: Couplings, keep: float, count: int) -> list[int]:
    """Return `count` layers, each the one that adds least to the predicted cost of those before it.

    Of equals the deeper goes first.
    """
    coupling, order = couplings.between(keep), list[int]()
    rest = list(couplings.layers)
    while rest and len(order) < count:
        added = {i: 0.5 * coupling[i, i] + sum(coupling[i, j] for j in order) for i in rest}
        order.append(min(rest, key=lambda i: (added[i], -i)))
        rest.remove(order[-1])
    return order
