"""GRASP: keep the singular groups whose removal, to first order, changes the task loss most.

Liu et al., Rethinking Layer Removal: Preserving Critical Components with Task-Aware SVD.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from layer_surgery import parallel
from layer_surgery.linalg.low_rank import attributed_groups, select_groups, svd
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext, SurgeryObserver
from layer_surgery.walk.gradients import accumulated_gradients


class GraspObserver(SurgeryObserver):
    """Turns the linears of each layer that it sees into factors, on the spot, from their summed gradients."""

    def __init__(self, ranks: Mapping[int, Mapping[str, int]], context: SurgeryContext) -> None:
        self._ranks = ranks
        self.work_in(context)
        self._sums = parallel.Sums()

    def end_round(self, present: int) -> None:
        self._sums.close(present)

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        ranks = self._ranks[index]
        weights: dict[str, nn.Parameter] = {name: layer.get_parameter(f"{name}.weight") for name in ranks}
        costs = {name: float(weight.numel() * min(weight.shape)) for name, weight in weights.items()}
        owner_of = parallel.owners(costs)
        self._sums = parallel.Sums(lambda name: (owner_of[name],))
        with accumulated_gradients(weights, self._sums) as gradients:
            yield
            with self.context.divided(costs, owner_of) as names:
                for name in names:
                    spectrum = svd(weights[name].detach())
                    chosen = attributed_groups(spectrum, gradients[name], ranks[name])
                    factors, values = select_groups(spectrum, chosen), spectrum.s.tolist()
                    self.context.write(index, name, factors, "weight", values, set(chosen.tolist()))


@METHODS.add(
    "grasp",
    needs_data=True,
    needs_boundaries=True,
)
def grasp(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Select groups for all layers at once, from the gradients of the original model: `dLoss/ds_k = u_k^T G v_k`."""
    ranks = {layer.index: layer.ranks for layer in plan.low_rank}
    observers = [GraspObserver(ranks, context)]
    context.walk.backpropagate(observers, watch=ranks, forward=context.boundaries, steps=context.steps)
    return plan


def write_best_groups(ranks: Mapping[int, Mapping[str, int]], context: SurgeryContext) -> None:
    """Write factors of these ranks, by layer and linear, chosen by the gradients of the model as it is."""
    context.walk.backpropagate([GraspObserver(ranks, context)], watch=ranks)
