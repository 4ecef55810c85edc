"""Channels of an MLP, chosen in the metric of the task loss; the output projection is re-solved on those that stay."""

from layer_surgery.surgeon.components.kind import KINDS, PartOfLayer
from layer_surgery.surgeon.curves import Alternative


@KINDS.add("channels")
def channels(part: PartOfLayer) -> Alternative | None:
    """Offer every width of an MLP; see `linalg/nystrom.py` for what each costs."""
    curve = part.unit_curve(part.multiple) if part.part == "mlp" else None
    return None if curve is None else Alternative("channels", (curve,))
