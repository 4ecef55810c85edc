"""What a plan keeps of channels, heads, experts and linear maps, written: cut, and outputs re-solved on what stays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from layer_surgery import parallel
from layer_surgery.calibration.expert_channels import (
    experts_by_worth,
    joint_gains,
    kept_channels,
    narrowed_outputs,
)
from layer_surgery.calibration.moment_observer import MomentObserver, weights_with_inputs
from layer_surgery.calibration.statistics import Statistics
from layer_surgery.calibration.units import UnitOrder, Units
from layer_surgery.checkpoint.bypass import Bypass
from layer_surgery.checkpoint.experts import Experts, of_some
from layer_surgery.errors import PlanError
from layer_surgery.linalg.nystrom import narrowed
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.context import SurgeryContext, SurgeryObserver
from layer_surgery.surgeon.plan import ModelShape
from layer_surgery.walk.expert_moments import ExpertMoments
from layer_surgery.walk.moments import LayerMoments


@dataclass(frozen=True)
class _Cut:
    """Units of one layer, in the order in which to keep them, and how many stay."""

    name: Literal["channels", "heads"]
    units: Units
    order: UnitOrder
    count: int


@dataclass(frozen=True)
class _ExpertCut:
    """The experts of one layer, the channels of each in the order in which to keep them, and how many stay."""

    experts: Experts
    orders: list[UnitOrder]
    count: int


@dataclass(frozen=True)
class _Fewer:
    """The experts of one layer, the channels of each, and how many experts stay."""

    experts: Experts
    orders: list[UnitOrder]
    count: int


def narrow(plan: SurgeryPlan, shape: ModelShape, statistics: Statistics, context: SurgeryContext) -> None:
    """Write the linears of the channels and heads that stay, the experts with the channels that stay, and bypasses."""
    cuts: dict[int, list[_Cut]] = {}
    expert_cuts: dict[int, _ExpertCut] = {}
    fewer: dict[int, _Fewer] = {}
    for layer in plan.smaller:
        sized = shape.layers[layer.index]
        each: tuple[tuple[Literal["channels", "heads"], Units | None, int | None, UnitOrder | None], ...] = (
            ("channels", sized.channels, layer.channels, statistics.channels.get(layer.index)),
            ("heads", sized.heads, layer.heads, statistics.heads.get(layer.index)),
        )
        for name, units, count, order in each:
            if units is None or count is None:
                continue
            if order is None:
                raise PlanError(f"the plan keeps {count} {name} of layer {layer.index}, but no statistics rank them.")
            cuts.setdefault(layer.index, []).append(_Cut(name, units, order, count))
        if sized.experts is not None and layer.experts is not None:
            expert_cuts[layer.index] = _ExpertCut(sized.experts, _orders(statistics, layer.index), layer.experts)
        if sized.experts is not None and layer.routed is not None:
            fewer[layer.index] = _Fewer(sized.experts, _orders(statistics, layer.index), layer.routed)
        if sized.bypass is not None and layer.bypass is not None:
            for index in context.unfinished([layer.index], "{} bypass".format):
                _write_map(index, sized.bypass, layer.bypass, statistics, context)
    watched = {*cuts, *expert_cuts}
    if watched:
        observers = [_Narrowing(cuts, expert_cuts, context)]
        path = range(max(watched) + 1)
        context.walk.forward(path, keep=False, observers=observers, watch=watched, steps=context.steps)
    for index in context.unfinished(fewer, "{} routed".format):
        _write_fewer(index, fewer[index], context)


def _orders(statistics: Statistics, index: int) -> list[UnitOrder]:
    orders = statistics.experts.get(index)
    if orders is None:
        raise PlanError(f"the plan cuts the experts of layer {index}, but no statistics rank them.")
    return orders


def _write_fewer(index: int, cut: _Fewer, context: SurgeryContext) -> None:
    """Write the experts of a layer that stay as they are, and the router's part of them."""
    order = experts_by_worth(cut.orders)
    kept = order.kept(cut.count)
    with context.model.layer(index) as layer:
        for name in (cut.experts.module, cut.experts.router):
            context.write_alike(index, name, of_some(layer.get_submodule(name), kept))
    context.record_units(index, cut.experts.module, "routed", order.gains, cut.count)


def _write_map(index: int, bypass: Bypass, rank: int, statistics: Statistics, context: SurgeryContext) -> None:
    """Write the linear map of this rank that takes the place of an MLP."""
    if index not in statistics.maps:
        raise PlanError(f"the plan has a bypass in layer {index}, but no statistics hold a linear map for its MLP.")
    context.write_alike(index, bypass.module, statistics.map_tensors(index, bypass.module, rank))
    context.record_map(index, bypass.module, statistics.maps[index].values, rank)


class _Narrowing(SurgeryObserver, MomentObserver):
    """Cuts the units and the experts of each layer, and re-solves its output projections on what stays."""

    def __init__(
        self, cuts: Mapping[int, list[_Cut]], expert_cuts: Mapping[int, _ExpertCut], context: SurgeryContext
    ) -> None:
        super().__init__(
            {index: [cut.units.output for cut in each] for index, each in cuts.items()},
            gradients=False,
            experts={index: cut.experts for index, cut in expert_cuts.items()},
        )
        self._cuts, self._expert_cuts = cuts, expert_cuts
        self.work_in(context)

    def reduce(self, index: int, layer: nn.Module, moments: LayerMoments) -> None:
        cuts = {cut.units.output: cut for cut in self._cuts.get(index, ())}
        store, all_rows = self.context.factors, self.context.rows.setdefault(index, {})
        with parallel.together():
            for name, weight, inputs in weights_with_inputs(layer, parallel.own(self.owner_of, cuts), moments, index):
                cut = cuts[name]
                kept = cut.order.kept(cut.count)
                store.write_tensors(index, name, {"weight": narrowed(weight, inputs, cut.units.columns(kept))})
                for feeding, rows in cut.units.rows(kept).items():
                    linear = layer.get_submodule(feeding)
                    tensors = {part: tensor.detach()[rows] for part, tensor in linear.named_parameters()}
                    store.write_tensors(index, feeding, tensors)
        for name, cut in cuts.items():
            all_rows |= cut.units.rows(cut.order.kept(cut.count))
            self.context.record_units(index, name, cut.name, cut.order.gains, cut.count)

    def reduce_experts(self, index: int, layer: nn.Module, experts: Experts, moments: ExpertMoments | None) -> None:
        cut, module = self._expert_cuts[index], layer.get_submodule(experts.module)
        with parallel.together():
            if moments is not None:
                kept = kept_channels(cut.orders, cut.count)
                outputs = narrowed_outputs(experts, module, moments, kept, index)
                tensors = {"down_proj": experts.as_stored(outputs), **experts.only(module, kept)}
                self.context.factors.write_tensors(index, experts.module, tensors)
        self.context.record_units(index, experts.module, "experts", joint_gains(cut.orders), cut.count)
