"""Whole experts of a layer, with their rows of the router, which then chooses among those that stay."""

import numpy as np

from layer_surgery.calibration.expert_channels import experts_by_worth
from layer_surgery.surgeon.components.kind import KINDS, PartOfLayer
from layer_surgery.surgeon.curves import Alternative, Curve


@KINDS.add("routed")
def routed(part: PartOfLayer) -> Alternative | None:
    """Offer every number of experts that a token can still choose from."""
    experts, statistics = part.experts, part.statistics
    if experts is None or not experts.router:
        return None
    counts = np.arange(experts.chosen, experts.number)
    if not len(counts):
        return None
    costs = np.zeros(experts.number + 1)
    if statistics is not None:
        if part.index not in statistics.experts:
            return None
        costs = np.array(experts_by_worth(statistics.experts[part.index]).costs()) * statistics.loss_scale
    return Alternative("routed", (Curve(counts, costs[counts], part.pricing.of_fewer_experts(experts, counts)),))
