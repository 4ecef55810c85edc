"""The whole attention or the whole MLP of a layer, which nothing takes the place of; both are the whole layer."""

from layer_surgery.surgeon.components.kind import KINDS, PartOfLayer
from layer_surgery.surgeon.curves import Alternative

#: What this alternative of a part is called.
GONE = "gone"


@KINDS.add("attention")
def attention(part: PartOfLayer) -> Alternative | None:
    """Offer to remove the attention."""
    return _gone(part) if part.part == "attention" else None


@KINDS.add("mlp")
def mlp(part: PartOfLayer) -> Alternative | None:
    """Offer to remove the MLP."""
    return _gone(part) if part.part == "mlp" else None


def _gone(part: PartOfLayer) -> Alternative | None:
    """To second order, what a part adds to the stream is worth all components of its output projection."""
    if not part.output:
        return None
    prices = part.pricing.of(part.index, part.part, [], share=0.0)
    cost = float(part.rank_costs(part.output)[0])
    return Alternative.single(GONE, cost, {name: float(price) for name, price in prices.items()})
