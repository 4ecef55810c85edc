"""One search over the layers: what of each attention and MLP is kept, and how, in one currency.

Every kind of component (`components/`) prices what it offers in nats per token, and in what the budgets limit. So one
search (`search.py`) divides the budgets among channels of MLPs, singular vectors of linears, heads and whole parts.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import nn

from layer_surgery import parallel
from layer_surgery.calibration.expert_channels import (
    experts_by_worth,
    joint_gains,
    kept_channels,
    narrowed_outputs,
)
from layer_surgery.calibration.moment_observer import MomentObserver, weights_with_inputs
from layer_surgery.calibration.statistics import Statistics, replaceable_linears, useful_rank
from layer_surgery.calibration.units import UnitOrder, Units
from layer_surgery.checkpoint.architectures import Architecture
from layer_surgery.checkpoint.bypass import Bypass
from layer_surgery.checkpoint.experts import Experts, of_some
from layer_surgery.checkpoint.size_fields import plain_kinds
from layer_surgery.config import DEFAULT_COMPONENTS, UNIFORM_COMPONENTS, SearchConfig
from layer_surgery.devices import TILE_MULTIPLE
from layer_surgery.errors import PlanError
from layer_surgery.linalg.nystrom import narrowed
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.surgeon.components import KINDS, PartOfLayer
from layer_surgery.surgeon.components.whole import GONE
from layer_surgery.surgeon.context import METHODS, SurgeryContext, SurgeryObserver
from layer_surgery.surgeon.curves import Floats, Place
from layer_surgery.surgeon.plan import ModelShape, plan_parameters
from layer_surgery.surgeon.remove import without_parts
from layer_surgery.surgeon.resources import CACHE, OPTIONS, PARAMETERS, TIME, Pricing
from layer_surgery.surgeon.search import Choice, Found, UnreachableBudget, search
from layer_surgery.surgeon.shape import model_shape
from layer_surgery.walk.expert_moments import ExpertMoments
from layer_surgery.walk.moments import LayerMoments

#: What is cut beside the default where a resource is limited that channels and ranks save little of.
_ALSO = {CACHE: ("heads", "attention"), TIME: ("attention", "mlp")}
#: Largest default of `--multiple`, and the share of the hidden size that it is at most.
_LARGEST_MULTIPLE, _SHARE_OF_HIDDEN = TILE_MULTIPLE, 16


@METHODS.add(
    "mix",
    needs_data=True,
    moments=True,
    needs_boundaries=True,
    refits=True,
    searches=True,
)
def mix(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Keep what is worth most nats within the budgets in the layers of the plan; return the plan with what that is.

    What the user gave (`context.ranks_fixed`) is kept as it is.
    """
    checkpoint, statistics_of = context.model.checkpoint, context.statistics
    shape = model_shape(checkpoint, statistics_of.part)
    planned = {layer.index: layer for layer in plan.smaller}
    sizes = {index: replaceable_linears(context.model, index, statistics_of.part) for index in planned}
    most = {
        index: {name: max(useful_rank(size), planned[index].ranks.get(name, 0)) for name, size in linears.items()}
        for index, linears in sizes.items()
    }
    if not planned or all(layer.action == "low_rank" and not any(layer.ranks.values()) for layer in plan.smaller):
        return without_parts(plan, context)
    statistics = statistics_of.get(context.walk, most)
    if not context.ranks_fixed:
        plan = _searched(plan, shape, statistics, context)
    without_parts(plan, context)
    for layer in context.unfinished(plan.low_rank, lambda layer: f"{layer.index} low-rank"):
        ranks = {name: rank for name, rank in layer.ranks.items() if rank}
        with context.divided(dict.fromkeys(ranks, 1.0)) as names:
            for name, factors in statistics.factors(layer.index, {name: ranks[name] for name in names}).items():
                values = statistics.values[layer.index][name]
                context.write(layer.index, name, factors, "fisher", values, ranks[name])
    _narrow(plan, shape, statistics, context)
    return plan


# The search


def parts_of(
    indices: Collection[int],
    shape: ModelShape,
    architecture: Architecture,
    multiple: int,
    pricing: Pricing,
    statistics: Statistics | None = None,
) -> Iterator[PartOfLayer]:
    """Yield attention and MLP of some layers, as far as they have linears that can be replaced, and their experts."""
    halves: tuple[tuple[Literal["attention", "mlp"], tuple[str, ...]], ...] = (
        ("attention", architecture.attention),
        ("mlp", architecture.mlp),
    )
    for index in indices:
        layer = shape.layers[index]
        for part, names in halves:
            linears = {name: layer.linears[name] for name in names if name in layer.linears}
            if linears:
                yield PartOfLayer(
                    index=index,
                    part=part,
                    linears=linears,
                    output="" if architecture.guessed else [*linears][-1],
                    units=layer.channels if part == "mlp" else layer.heads,
                    bypass=layer.bypass if part == "mlp" else None,
                    pricing=pricing,
                    multiple=multiple,
                    statistics=statistics,
                )
        if layer.experts is not None:
            yield PartOfLayer(
                index=index,
                part="experts",
                linears={},
                output="",
                units=None,
                experts=layer.experts,
                pricing=pricing,
                multiple=multiple,
                statistics=statistics,
            )


def places_of(parts: Collection[PartOfLayer], kinds: Collection[str], *, uniform: bool) -> list[Place]:
    """Return what may be done to each part, by the kinds that are named; uniformly, only units are cut.

    Raises `PlanError` for a kind that is not there in any of the parts.
    """
    places, found = [], set[str]()
    for part in parts:
        alternatives = [part.whole()]
        for kind in KINDS:
            wanted = kind.name in kinds and not (uniform and kind.name not in UNIFORM_COMPONENTS)
            offered = kind.offer(part) if wanted else None
            if offered is not None:
                alternatives.append(offered)
                found.add(kind.name)
        places.append(Place(part.name, tuple(alternatives)))
    missing = [kind for kind in kinds if kind not in found]
    if missing and not (uniform and found):
        raise PlanError(
            f"--components {missing[0]}: none of the chosen layers can be cut in this way; leave it out, or choose "
            "other layers."
        )
    return places


def kinds_for(options: SearchConfig, limited: Collection[str]) -> tuple[str, ...]:
    """Return the kinds that the user names, or those that the limited resources need."""
    if options.components is not None:
        return options.components
    also = [kind for resource in limited for kind in _ALSO.get(resource, ())]
    return tuple(dict.fromkeys([*DEFAULT_COMPONENTS, *also]))


def multiple_for(options: SearchConfig, hidden_size: int) -> int:
    """Return the multiple that the user names, or the power of two that suits the hidden size."""
    if options.multiple is not None:
        return options.multiple
    return min(_LARGEST_MULTIPLE, 1 << max(0, (hidden_size // _SHARE_OF_HIDDEN).bit_length() - 1))


def find(
    plan: SurgeryPlan,
    shape: ModelShape,
    architecture: Architecture,
    options: SearchConfig,
    pricing: Pricing,
    statistics: Statistics | None = None,
    plain: Collection[str] = (),
) -> Found:
    """Search for the best choice within the budgets of a plan; without statistics, for any within them.

    With `--uniform`, only the kinds in `plain` are cut. Raises `PlanError` for budgets that cannot be kept, with what
    can be.
    """
    multiple = multiple_for(options, shape.hidden_size)
    parts = list(parts_of([layer.index for layer in plan.smaller], shape, architecture, multiple, pricing, statistics))
    budgets = {PARAMETERS: float(plan.parameter_bound), **plan.bounds}
    kinds = kinds_for(options, plan.bounds)
    if options.components is None:
        kinds = _there_are(kinds, parts)
    if options.uniform:
        kinds = tuple(kind for kind in kinds if kind in plain)
        if not kinds:
            raise PlanError(
                f"--uniform: no field of the configuration of {architecture.model_type} says this size of all layers "
                "and nothing else, so the result would be no plain checkpoint; leave it out, or name other "
                "--components."
            )
    places = places_of(parts, kinds, uniform=options.uniform)
    taken = {name: sum(float(place.alternatives[0].curves[0].prices[name][0]) for place in places) for name in budgets}
    gone = sum(shape.layers[layer.index].parameters for layer in plan.layers if layer.action == "remove")
    totals = {PARAMETERS: float(shape.parameters - gone), **pricing.totals}
    alike = []
    if options.uniform:
        alike = [
            [place.name for place in places if place.name.endswith(part)] for part in ("attention", "mlp", "experts")
        ]
    try:
        return search(
            places,
            budgets,
            fixed={name: totals[name] - taken[name] for name in budgets},
            couplings=_couplings(places, statistics),
            alike=alike,
        )
    except UnreachableBudget as error:
        cut = f"{', '.join(kinds) or 'nothing'} in multiples of {multiple}"
        raise _unreachable(error, plan, shape, totals, cut, _option_used(options, plan)) from error


def _option_used(options: SearchConfig, plan: SurgeryPlan) -> str:
    """Return the option that the budget of parameters came from."""
    given = [name for name in ("target_size", "target_parameters") if getattr(options, name, None) is not None]
    some = len(plan.smaller) < len(plan.layers)
    return f"--{given[0].replace('_', '-')}" if given else "--keep" if some else "--target-parameters"


def _couplings(places: Collection[Place], statistics: Statistics | None) -> Floats | None:
    """Return how far the errors of the parts meet; None where that is not known."""
    names = [place.name for place in places]
    found = None if statistics is None else statistics.couplings.correlations(names)
    return None if found is None else np.array(found)


def _there_are(kinds: tuple[str, ...], parts: Collection[PartOfLayer]) -> tuple[str, ...]:
    """Return the kinds that some part has."""
    return tuple(kind for kind in kinds if any(KINDS[kind].offer(part) is not None for part in parts))


def _unreachable(
    error: UnreachableBudget,
    plan: SurgeryPlan,
    shape: ModelShape,
    totals: Mapping[str, float],
    cut: str,
    option: str,
) -> PlanError:
    """Return the error that says in the options of the command line what can be reached."""
    asked, reachable, note = [], [], ""
    for name, least in error.reachable.items():
        if name == PARAMETERS:
            asked.append(f"{plan.parameter_bound:,} parameters")
            chosen = sum(shape.layers[layer.index].parameters for layer in plan.smaller)
            share = (least - totals[PARAMETERS] + chosen) / chosen if option == "--keep" else least / shape.parameters
            size = shape.size_bytes - math.floor((shape.parameters - least) * shape.itemsize)
            reachable.append(f"{option} {f'{size}B or more' if option == '--target-size' else f'{_up(share)} to 1'}")
            note = f" (what stays whole, as norms and biases, and the least of the rest take {least:,.0f})"
        else:
            asked.append(f"{OPTIONS[name]} {plan.bounds[name] / totals[name]:.4g}")
            reachable.append(f"{OPTIONS[name]} {_up(least / totals[name])} to 1")
    together, note = (" together", "") if len(asked) > 1 else ("", note)
    return PlanError(
        f"the budget of {' and '.join(asked)} cannot be reached{together} by cutting {cut}{note}; reachable: "
        f"{' with '.join(reachable)}, less with more --components or a lower --multiple, or --target-layers with "
        "--keep 0 to remove layers outright."
    )


def _up(fraction: float) -> str:
    """Return a fraction in four digits, rounded up, so that it is itself allowed."""
    return f"{math.ceil(fraction * 1e4 - 1e-9) / 1e4:.4f}"


def _searched(plan: SurgeryPlan, shape: ModelShape, statistics: Statistics, context: SurgeryContext) -> SurgeryPlan:
    """Return the plan with the best mix within its bounds."""
    architecture = context.model.architecture
    plain = plain_kinds(context.model.checkpoint) if context.search.uniform else ()
    found = find(plan, shape, architecture, context.search, context.pricing, statistics, plain)
    layers = [
        _layer_plan(layer, shape, architecture, found.choices) if layer.action in ("low_rank", "reduce") else layer
        for layer in plan.layers
    ]
    removed = any(layer.action == "remove" for layer in plan.layers)
    plan = replace(
        plan,
        layers=layers,
        target_layers=sum(layer.action == "keep" for layer in layers),
        predicted_loss_rise=None if removed else round(found.cost, 6),
        predicted_loss_bound=None if removed else round(found.cost - found.gap, 6),
    )
    return replace(plan, parameters=plan_parameters(shape, plan))


def _layer_plan(
    layer: LayerPlan, shape: ModelShape, architecture: Architecture, choices: Mapping[str, Choice]
) -> LayerPlan:
    """Return what the search has chosen for a layer."""
    linears = shape.layers[layer.index].linears
    ranks: dict[str, int] = {}
    units: dict[str, int] = {}
    for part, names in (("attention", architecture.attention), ("mlp", architecture.mlp)):
        choice = choices.get(f"{layer.index} {part}")
        if choice is None:
            continue
        if choice.kind == "singular":
            ranks |= {name: rank for name, rank in choice.steps.items() if rank < math.prod(linears[name])}
        elif choice.kind == GONE:
            ranks |= {name: 0 for name in names if name in linears}
        elif choice.kind in ("channels", "heads", "bypass"):
            (units[choice.kind],) = choice.steps.values()
    of_experts = choices.get(f"{layer.index} experts")
    if of_experts is not None and of_experts.kind in ("experts", "routed"):
        (units[of_experts.kind],) = of_experts.steps.values()
    if not ranks and not units:
        return LayerPlan(index=layer.index, action="keep")
    return LayerPlan(index=layer.index, action="reduce" if units else "low_rank", ranks=ranks, **units)


# What was chosen, carried out


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


def _narrow(plan: SurgeryPlan, shape: ModelShape, statistics: Statistics, context: SurgeryContext) -> None:
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
