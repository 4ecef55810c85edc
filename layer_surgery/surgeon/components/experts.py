"""Channels of the experts of a layer, as many in each; which ones, every expert has by itself."""

from layer_surgery.surgeon.components.kind import KINDS, PartOfLayer
from layer_surgery.surgeon.curves import Alternative


@KINDS.add("experts")
def experts(part: PartOfLayer) -> Alternative | None:
    """Offer every width of the experts; each output projection is re-solved on the channels that stay in it."""
    curve = part.expert_curve()
    return None if curve is None else Alternative("experts", (curve,))
