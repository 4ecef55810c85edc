"""Singular vectors of single linears, in the metric of the task loss: the components of the method `fisher`."""

import numpy as np

from layer_surgery.calibration.statistics import useful_rank
from layer_surgery.surgeon.components.kind import KINDS, PartOfLayer
from layer_surgery.surgeon.curves import Alternative, Curve


@KINDS.add("singular")
def singular(part: PartOfLayer) -> Alternative | None:
    """Offer every rank of each linear of the part, and each as it is."""
    return Alternative("singular", tuple(_curve(name, part) for name in part.linears)) if part.linears else None


def _curve(name: str, part: PartOfLayer) -> Curve:
    """Return the curve of the ranks of a linear; its last step, `out * in`, is the linear as it is."""
    (out, in_), costs = part.linears[name], part.rank_costs(name)
    most = useful_rank((out, in_))
    if part.statistics is not None:
        most = min(most, part.statistics.ranks[part.index][name])
    ranks = np.arange(part.multiple, most + 1, part.multiple)
    low_rank = part.pricing.of(part.index, "", [(ranks, in_), (out, ranks)])
    whole = part.pricing.of(part.index, "", [(out, in_)])
    if name == [*part.linears][-1]:
        # Neither the cache nor the scores shrink with ranks: they are on one of the curves.
        cache = part.pricing.of(part.index, part.part, [])
        low_rank, whole = ({key: value + cache[key] for key, value in prices.items()} for prices in (low_rank, whole))
    prices = {key: np.append(low_rank[key], whole[key]) for key in whole}
    return Curve(np.append(ranks, out * in_), np.append(costs[ranks], 0.0), prices, name)
