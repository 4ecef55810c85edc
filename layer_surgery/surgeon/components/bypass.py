"""A low-rank linear map in the place of a whole MLP; with the attention gone too, in the place of the layer."""

import numpy as np

from layer_surgery.calibration.statistics import useful_rank
from layer_surgery.surgeon.components.kind import KINDS, PartOfLayer
from layer_surgery.surgeon.curves import Alternative, Curve


@KINDS.add("bypass")
def bypass(part: PartOfLayer) -> Alternative | None:
    """Offer every rank of the best linear map from what the MLP reads to what it gives."""
    found, statistics = part.bypass, part.statistics
    if found is None or (statistics is not None and part.index not in statistics.maps):
        return None
    hidden = found.hidden
    ranks = np.arange(part.multiple, useful_rank((hidden, hidden)) + 1, part.multiple)
    if not len(ranks):
        return None
    costs = np.zeros(len(ranks))
    if statistics is not None:
        costs = np.array(statistics.maps[part.index].costs())[ranks] * statistics.loss_scale
    # It has a bias of its own, and those of the MLP go.
    prices = part.pricing.of(part.index, part.part, [(ranks, hidden), (hidden, ranks)], less=found.biases - hidden)
    return Alternative("bypass", (Curve(ranks, costs, prices),))
