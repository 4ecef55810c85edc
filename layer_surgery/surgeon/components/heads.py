"""Heads of an attention: a key/value head with the queries that read it goes, and its part of the KV cache with it."""

from layer_surgery.surgeon.components.kind import KINDS, PartOfLayer
from layer_surgery.surgeon.curves import Alternative


@KINDS.add("heads")
def heads(part: PartOfLayer) -> Alternative | None:
    """Offer every number of heads; the output projection is re-solved on those that stay."""
    curve = part.unit_curve(1) if part.part == "attention" else None
    return None if curve is None else Alternative("heads", (curve,))
