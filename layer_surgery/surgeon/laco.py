"""LaCo: removed layers are merged into the layer before them. Looks at no data.

Yang et al., LaCo: Large Language Model Pruning via Layer Collapse.
"""

import torch
from torch import Tensor

from layer_surgery.errors import PlanError
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext
from layer_surgery.surgeon.plan import runs_behind_a_layer
from layer_surgery.walk.streamed import StreamedModel


@METHODS.add(
    "laco",
    removes=True,
    behind=True,
)
def laco(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Put `W_l + sum_k (W_{l+k} - W_l)` in the place of each linear's W_l, l the layer before a removed run.

    This is the paper's merge; which layers are merged is the plan's choice and not the paper's search by similarity.
    """
    model = context.model
    runs = runs_behind_a_layer(plan)
    for index in [index for first, after in runs for index in range(first - 1, after)]:
        prefix = model.checkpoint.layer_prefix(index)
        if any(name.startswith(prefix) for name in model.checkpoint.low_rank):
            raise PlanError(
                f"--method laco adds up whole weights, and layer {index} is low-rank already; choose other layers."
            )
    with context.progress("merging", len(runs)) as advance:
        for first, after in context.unfinished(runs, str):
            for name in model.architecture.linears:
                merged = {own: _merged(model, f"{name}.{own}", first, after) for own in ("weight", "bias")}
                tensors = {own: tensor for own, tensor in merged.items() if tensor is not None}
                if tensors:
                    context.write_alike(first - 1, name, tensors)
            advance()
    return plan


def _merged(model: StreamedModel, name: str, first: int, after: int) -> Tensor | None:
    """Return the merged tensor, or None if one of the layers does not have it."""
    names = [f"{model.checkpoint.layer_prefix(index)}{name}" for index in range(first - 1, after)]
    if any(tensor not in model.checkpoint.source.specs for tensor in names):
        return None
    read = model.read_weights(names)
    start = read[names[0]].double()
    return start + sum((read[other].double() - start for other in names[1:]), torch.zeros_like(start))
