"""SVD-LLM: truncated SVD in the metric of what each linear reads.

Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression
(https://arxiv.org/abs/2403.07378).
"""

from collections.abc import Mapping

from torch import nn

from layer_surgery.calibration.moment_observer import MomentObserver, weights_with_inputs
from layer_surgery.linalg.decomposition import takes_leading
from layer_surgery.linalg.leading import leading_whitened_svd
from layer_surgery.linalg.low_rank import Factors, whitened_svd
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext, SurgeryObserver
from layer_surgery.walk.moments import LayerMoments


class WhitenedObserver(SurgeryObserver, MomentObserver):
    """Truncates the linears of each layer that it sees, in the metric of their inputs."""

    def __init__(self, ranks: Mapping[int, Mapping[str, int]], context: SurgeryContext) -> None:
        super().__init__(ranks, gradients=False)
        self._ranks = ranks
        self.work_in(context)

    def reduce(self, index: int, layer: nn.Module, moments: LayerMoments) -> None:
        ranks = self._ranks[index]
        with self.context.divided(dict.fromkeys(ranks, 1.0), self.owner_of) as names:
            for name, weight, inputs in weights_with_inputs(layer, names, moments, index):
                if takes_leading(self.context.walk.settings.decomposition, *weight.shape):
                    (left, right), values = leading_whitened_svd(weight, inputs, None, ranks[name])
                else:
                    (left, right), values = whitened_svd(weight, inputs)
                factors = Factors(left[:, : ranks[name]], right[: ranks[name]])
                self.context.write(index, name, factors, "inputs", values.tolist(), ranks[name])


@METHODS.add(
    "svd_llm",
    needs_data=True,
    moments=True,
)
def svd_llm(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Truncate each linear in the metric of its inputs' second moment, at the plan's ranks."""
    walk = context.walk
    ranks = {layer.index: layer.ranks for layer in plan.low_rank}
    observers = [WhitenedObserver(ranks, context)]
    walk.forward(range(max(ranks) + 1), keep=False, observers=observers, watch=ranks, steps=context.steps)
    return plan
