"""GRASP as its paper has it: last layer first, with new gradients after every replaced attention and MLP.

Liu et al., Rethinking Layer Removal: Preserving Critical Components with Task-Aware SVD.
"""

from functools import partial

from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext
from layer_surgery.surgeon.grasp import write_best_groups


@METHODS.add(
    "grasp_sequential",
    needs_data=True,
    needs_boundaries=True,
)
def grasp_sequential(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Replace the MLP, then the attention, of each layer from last to first; take new gradients before each.

    The layers before the one at hand are still the original's, so their boundaries are used again.
    """
    model, walk = context.model, context.walk
    try:
        for layer in sorted(plan.low_rank, key=lambda layer: -layer.index):
            for group in (model.architecture.mlp, model.architecture.attention):
                ranks = {name: rank for name, rank in layer.ranks.items() if name in group}
                if ranks:
                    for _ in context.unfinished([f"{layer.index} {group[-1]}"], str):
                        write_best_groups({layer.index: ranks}, context)
                    model.replace(layer.index, ranks, partial(context.factors.read, layer.index))
                    walk.forget(layer.index)
    finally:  # the model is the original again for whoever uses it next
        model.restore()
        if plan.low_rank:
            walk.forget(min(layer.index for layer in plan.low_rank))
    return plan
