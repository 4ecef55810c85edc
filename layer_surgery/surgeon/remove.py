"""Removal outright: nothing takes the place of a layer, or factors of rank 0 that of a part."""

from layer_surgery.checkpoint.modeling_layer_surgery import IN_FACTOR, OUT_FACTOR
from layer_surgery.linalg.low_rank import no_components
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext


@METHODS.add("remove", removes=True)
def remove(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Do nothing to removed layers; write factors of rank 0 for the removed attention or MLP of others."""
    return without_parts(plan, context)


def without_parts(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Write factors of rank 0, [out, 0] and [0, in], for every linear that has this rank in the plan."""
    for layer in context.unfinished(plan.low_rank, lambda layer: f"{layer.index} without parts"):
        module = context.model.layers[layer.index]
        for name in (name for name, rank in layer.ranks.items() if not rank):
            out, in_ = module.get_parameter(f"{name}.weight").shape
            left, right = no_components((out, in_))
            context.write_alike(layer.index, name, {OUT_FACTOR: left, IN_FACTOR: right})
    return plan
