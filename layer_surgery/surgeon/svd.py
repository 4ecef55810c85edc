"""Plain truncated SVD of each weight."""

from layer_surgery.linalg import low_rank
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext


@METHODS.add(
    "svd",
)
def plain_svd(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Replace each linear of the low-rank layers by its truncated SVD."""
    with context.progress("truncating", len(plan.low_rank)) as advance:
        for layer in context.unfinished(plan.low_rank, lambda layer: str(layer.index)):
            prefix = context.model.checkpoint.layer_prefix(layer.index)
            module = context.model.layers[layer.index]
            costs = {name: float(module.get_parameter(f"{name}.weight").numel()) for name in layer.ranks}
            with context.divided(costs) as names:
                for name in names:
                    weight, rank = f"{prefix}{name}.weight", layer.ranks[name]
                    spectrum = low_rank.svd(context.model.read_weights([weight])[weight])
                    factors = low_rank.truncated(spectrum, rank)
                    context.write(layer.index, name, factors, "weight", spectrum.s.tolist(), rank)
            advance()
    return plan
