"""GRASP: keep the singular groups whose removal, to first order, changes the task loss most.

Liu et al., Rethinking Layer Removal: Preserving Critical Components with Task-Aware SVD.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import nn

from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.linalg.low_rank import Factors, attributed_groups, select_groups, svd
from layer_surgery.records import LayerPlan, SpectrumRecord, SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext, the_walk
from layer_surgery.surgeon.spectra import spectrum_record
from layer_surgery.walk.gradients import accumulated_gradients
from layer_surgery.walk.walk import Observer, Walk

URL = "https://arxiv.org/abs/2501.00339"


class GraspObserver(Observer):
    """Turns the linears of each layer that it sees into factors, on the spot, from their summed gradients."""

    def __init__(
        self, ranks: Mapping[int, Mapping[str, int]], factors: FactorStore, spectra: list[SpectrumRecord]
    ) -> None:
        self._ranks, self._factors, self._spectra = ranks, factors, spectra

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        ranks = self._ranks[index]
        weights: dict[str, nn.Parameter] = {name: layer.get_parameter(f"{name}.weight") for name in ranks}
        with accumulated_gradients(weights) as gradients:
            yield
            for name, rank in ranks.items():
                spectrum = svd(weights[name].detach())
                chosen = attributed_groups(spectrum, gradients[name], rank)
                factors: Factors = select_groups(spectrum, chosen)
                self._factors.write(index, {name: factors})
                self._spectra.append(spectrum_record(index, name, "weight", spectrum.s.tolist(), set(chosen.tolist())))


@METHODS.add(
    "grasp",
    summary="singular groups by |s * dLoss/ds|, all from one backward walk (GRASP's importance)",
    source=URL,
    needs_boundaries=True,
)
def grasp(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Select groups for all layers at once, from the gradients of the original model: `dLoss/ds_k = u_k^T G v_k`."""
    ranks = {layer.index: layer.ranks for layer in plan.low_rank}
    walk = the_walk(context)
    path = list(range(context.model.layer_count))
    with walk.new_store(walk.settings.boundary_memory_bytes) as gradient:
        walk.losses(walk.forward(path, keep=True), gradient=(gradient, 0))
        observer = GraspObserver(ranks, context.factors, context.spectra)
        walk.backward(path, (gradient, 0), stop=min(ranks), observers=[observer], watch=ranks)
    return plan


@METHODS.add(
    "grasp_sequential",
    summary="the same, recomputed after every replaced attention and MLP, last to first, as the paper does",
    source=URL,
    needs_boundaries=True,
)
def grasp_sequential(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Replace the MLP, then the attention, of each layer from last to first; take new gradients before each.

    What lies below the layer at hand is still the original, so its boundaries are used again.
    """
    walk = the_walk(context)
    architecture = context.model.architecture
    try:
        for layer in sorted(plan.low_rank, key=lambda layer: -layer.index):
            for group in (architecture.mlp, architecture.attention):
                ranks = {name: rank for name, rank in layer.ranks.items() if name in group}
                if ranks:
                    _operate(walk, context, layer, ranks)
                    context.model.replace(layer.index, ranks, partial(context.factors.read, layer.index))
                    walk.forget(layer.index)
    finally:  # the model is the original again for whoever uses it next
        context.model.restore()
        if plan.low_rank:
            walk.forget(min(layer.index for layer in plan.low_rank))
    return plan


def _operate(walk: Walk, context: SurgeryContext, layer: LayerPlan, ranks: dict[str, int]) -> None:
    path = list(range(context.model.layer_count))
    with walk.new_store(walk.settings.boundary_memory_bytes) as gradient:
        walk.losses(walk.forward(path, keep=True), gradient=(gradient, 0))
        observer = GraspObserver({layer.index: ranks}, context.factors, context.spectra)
        walk.backward(path, (gradient, 0), stop=layer.index, observers=[observer], watch=[layer.index])
