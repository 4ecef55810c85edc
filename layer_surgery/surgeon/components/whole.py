"""The whole attention or the whole MLP of a layer, which nothing takes the place of; both are the whole layer."""

from torch import nn

from layer_surgery.checkpoint.architectures import Architecture
from layer_surgery.checkpoint.experts import experts_of
from layer_surgery.records import LayerPlan
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


def output_projections(layer: nn.Module, architecture: Architecture) -> list[str]:
    """Return the output projections of a layer's attention and MLP; [] if it has not both, or adds something else."""
    names = {name for name, _ in layer.named_modules()}
    outputs = [[name for name in part if name in names][-1:] for part in (architecture.attention, architecture.mlp)]
    if architecture.guessed or not all(outputs) or experts_of(layer) is not None:
        return []
    return [name for (name,) in outputs]


def is_empty(layer: nn.Module, plan: LayerPlan, architecture: Architecture) -> bool:
    """Return whether neither attention nor MLP of a layer adds anything: all linears are gone, and there is no bias."""
    outputs = output_projections(layer, architecture)
    linears = {name for name, _ in layer.named_modules()} & set(architecture.linears)
    gone = bool(outputs) and all(plan.ranks.get(name) == 0 for name in linears)
    return gone and all(getattr(layer.get_submodule(name), "bias", None) is None for name in outputs)


def _gone(part: PartOfLayer) -> Alternative | None:
    """To second order, what a part adds to the stream is worth all components of its output projection."""
    if not part.output:
        return None
    prices = part.pricing.of(part.index, part.part, [], share=0.0)
    cost = float(part.rank_costs(part.output)[0])
    return Alternative.single(GONE, cost, {name: float(price) for name, price in prices.items()})
