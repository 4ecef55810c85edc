"""Layers, actions and ranks of a surgery: pure arithmetic, budgets met exactly."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from layer_surgery.calibration.units import Units
from layer_surgery.checkpoint.bypass import Bypass
from layer_surgery.checkpoint.experts import WIDTH_MULTIPLE, Experts
from layer_surgery.config import BudgetConfig
from layer_surgery.errors import PlanError
from layer_surgery.records import LayerPlan, SurgeryPlan, UnitName

#: What errors call units, and what has them.
_UNITS: dict[UnitName, tuple[str, str]] = {
    "channels": ("channels", "MLP"),
    "heads": ("heads", "attention"),
    "experts": ("channels of experts", "mixture of experts"),
}


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of a decoder layer."""

    linears: dict[str, tuple[int, int]]  #: (out, in) of each linear that can be replaced, by its name within the layer.
    parameters: int  #: All of the layer's parameters, norms and biases included.
    channels: Units | None = None  #: Channels of its MLP, if they can be cut.
    heads: Units | None = None  #: Key/value heads of its attention with their queries, if they can be cut.
    experts: Experts | None = None  #: Its experts, if their channels can be cut.
    bypass: Bypass | None = None  #: Its MLP, if a linear map can take its place.

    @property
    def units(self) -> dict[UnitName, Units | Experts]:
        """What there can be fewer of, by the names that a plan has for it."""
        each: dict[UnitName, Units | Experts | None] = {
            "channels": self.channels,
            "heads": self.heads,
            "experts": self.experts,
        }
        return {name: units for name, units in each.items() if units is not None}

    @property
    def fixed(self) -> int:
        """Parameters that a low-rank layer keeps as they are: norms, biases, experts."""
        return self.parameters - sum(out * in_ for out, in_ in self.linears.values())


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a model."""

    layers: list[LayerShape]
    parameters: int  #: All parameters, tied ones once.
    hidden_size: int = 0  #: Width of the embeddings.
    size_bytes: int = 0  #: Of all tensors as they are stored.
    itemsize: int = 0  #: Bytes of a parameter that a cut saves.


def removal_count(budget: BudgetConfig, layer_count: int) -> int:
    """Return how many layers are to be operated on; `PlanError` if that is not possible."""
    if budget.layers is not None:
        outside = [index for index in budget.layers if not 0 <= index < layer_count]
        if outside:
            raise PlanError(f"--layers names {outside}, but the layers are 0 to {layer_count - 1}.")
        if len(budget.layers) >= layer_count:
            raise PlanError("--layers names every layer; at least one must stay whole.")
        if budget.target_layers not in (None, layer_count - len(budget.layers)):
            raise PlanError(
                f"--layers leaves {layer_count - len(budget.layers)} of {layer_count} layers whole, but "
                f"--target-layers is {budget.target_layers}; give only one of them."
            )
        return len(budget.layers)
    if budget.target_layers is None:
        raise PlanError(
            "there is no budget: give --target-parameters (a share of the whole model) or another target, "
            "--target-layers (how many layers stay whole), --layers or --plan."
        )
    if not 1 <= budget.target_layers < layer_count:
        raise PlanError(
            f"--target-layers is {budget.target_layers}; allowed: 1 to {layer_count - 1} "
            f"(the model has {layer_count} layers)."
        )
    return layer_count - budget.target_layers


def make_plan(shape: ModelShape, chosen: Sequence[int], budget: BudgetConfig, method: str) -> SurgeryPlan:
    """Return the plan that operates on the `chosen` layers within the budget, the same ratio for every matrix.

    `shape` is that of the parts which `budget.remove` names. With a budget of 0 the layers are removed; of parts, all
    linears get rank 0. Otherwise the rank of each linear is `floor(ratio * out * in / (out +
    in))` with one ratio for all, and what that leaves goes, one rank at a time, to the linears whose ideal rank was cut
    most. So parameters are never above the bound and below it by less than the cheapest rank.
    """
    chosen = sorted(chosen)
    operated = [shape.layers[index] for index in chosen]
    operated_parameters = sum(layer.parameters for layer in operated)
    rest = shape.parameters - operated_parameters
    bound = parameter_bound(budget, shape, operated_parameters)
    nothing_stays = _nothing_stays(budget, bound == rest)
    if not nothing_stays:
        _check_linears(shape, chosen)
    if nothing_stays and budget.remove != "layer":
        nothing = {index: dict.fromkeys(shape.layers[index].linears, 0) for index in chosen}  # biases stay
        return _low_rank_plan(shape, nothing, method)
    if nothing_stays:
        layers = [LayerPlan(index=i, action="remove" if i in chosen else "keep") for i in range(len(shape.layers))]
        return _plan(method, layers, rest, bound)
    ranks = uniform_ranks(
        operated,
        bound - rest,
        rest,
        shape.parameters,
        by_keep=budget.target_parameters is None and budget.target_size is None,
    )
    return _low_rank_plan(shape, dict(zip(chosen, ranks, strict=True)), method, bound)


def _low_rank_plan(
    shape: ModelShape, ranks: Mapping[int, dict[str, int]], method: str, bound: int | None = None
) -> SurgeryPlan:
    """Return the plan that gives some layers these ranks; without a bound, its parameters are the bound."""
    layers = [
        LayerPlan(index=i, action="low_rank", ranks=ranks[i]) if i in ranks else LayerPlan(index=i, action="keep")
        for i in range(len(shape.layers))
    ]
    parameters = plan_parameters(shape, _plan(method, layers, 0, 0))
    return _plan(method, layers, parameters, parameters if bound is None else bound)


def _check_linears(shape: ModelShape, chosen: Collection[int]) -> None:
    done = [index for index in sorted(chosen) if not shape.layers[index].linears]
    if done:
        raise PlanError(
            f"layers {done} have no linears that can be made low-rank (or are low-rank already); choose others, or "
            "remove them with --keep 0."
        )


def uniform_ranks(
    operated: Sequence[LayerShape], available: int, rest: int, total: int, *, by_keep: bool
) -> list[dict[str, int]]:
    """Return a rank for every linear of every operated layer, with at most `available` parameters in all.

    `rest` and `total` are the parameters outside these layers and of the whole model: errors state the reachable
    range in the unit that the user used (`by_keep`, or as a fraction of the model).
    """
    keys = [(position, name) for position, layer in enumerate(operated) for name in layer.linears]
    sizes = [operated[position].linears[name] for position, name in keys]
    costs = [out + in_ for out, in_ in sizes]
    fixed = sum(layer.fixed for layer in operated)
    least = fixed + sum(costs)
    if available < least:
        whole = sum(layer.parameters for layer in operated)
        option, low = ("--keep", least / whole) if by_keep else ("--target-parameters", (rest + least) / total)
        raise PlanError(
            f"the budget cannot be reached: what stays whole in these layers (norms, biases, experts) and one rank in "
            f"each of their linears take {least:,} parameters, but {max(0, available):,} are allowed; reachable: "
            f"{option} {_up(low)} to 1, or "
            "--keep 0 to remove the layers outright."
        )
    spendable = available - fixed
    ratio = spendable / sum(out * in_ for out, in_ in sizes)
    ideal = [ratio * out * in_ / (out + in_) for out, in_ in sizes]
    ranks = [min(max(1, math.floor(value)), *size) for value, size in zip(ideal, sizes, strict=True)]
    spent = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    # A tiny budget: raising ideal ranks below one to one has cost too much; take it back where it is felt least.
    while spent > spendable:
        k = max((k for k in range(len(ranks)) if ranks[k] > 1), key=lambda k: (ranks[k] - ideal[k], k))
        ranks[k] -= 1
        spent -= costs[k]
    by_loss = sorted(range(len(ranks)), key=lambda k: (ranks[k] - ideal[k], k))
    grew = True
    while grew:
        grew = False
        for k in by_loss:
            if ranks[k] < min(sizes[k]) and spent + costs[k] <= spendable:
                ranks[k] += 1
                spent += costs[k]
                grew = True
    result: list[dict[str, int]] = [{} for _ in operated]
    for (position, name), rank in zip(keys, ranks, strict=True):
        result[position][name] = rank
    return result


def plan_parameters(shape: ModelShape, plan: SurgeryPlan) -> int:
    """Return the number of parameters of the result."""
    total = shape.parameters
    for layer_plan in plan.operated:
        layer = shape.layers[layer_plan.index]
        total -= layer.parameters
        if layer_plan.action != "remove":
            total += layer.fixed
            for name, (out, in_) in layer.linears.items():
                rank = layer_plan.ranks.get(name)
                total += out * in_ if rank is None else rank * (out + in_)
            if layer_plan.routed is not None and layer.experts is not None:
                total -= (layer.experts.number - layer_plan.routed) * layer.experts.price_of_one
            if layer_plan.bypass is not None and layer.bypass is not None:
                total -= layer.bypass.parameters - layer.bypass.price(layer_plan.bypass)
            for unit, units in layer.units.items():
                if unit in layer_plan.units:
                    total -= (units.count - layer_plan.units[unit]) * units.price
    return total


def check_plan(shape: ModelShape, plan: SurgeryPlan, origin: str) -> SurgeryPlan:
    """Check a user's plan against the model and return it with its number of parameters. Raises `PlanError`."""
    if len(plan.layers) != len(shape.layers):
        raise PlanError(f"{origin} is for {len(plan.layers)} layers, but the model has {len(shape.layers)}.")
    if not any(layer.action != "remove" for layer in plan.layers):
        raise PlanError(f"{origin} removes every layer; at least one must stay.")
    for layer_plan in plan.low_rank:
        linears = shape.layers[layer_plan.index].linears
        for name, rank in layer_plan.ranks.items():
            if name not in linears:
                raise PlanError(
                    f"{origin}: layer {layer_plan.index} has no linear '{name}'; it has {', '.join(linears)}."
                )
            if rank > min(linears[name]):
                raise PlanError(
                    f"{origin}: rank {rank} for '{name}' of layer {layer_plan.index} is above its full rank, "
                    f"{min(linears[name])}."
                )
    for layer_plan in plan.smaller:
        if layer_plan.bypass is not None:
            _check_bypass(shape.layers[layer_plan.index], layer_plan, layer_plan.bypass, origin)
        if layer_plan.routed is not None:
            _check_routed(shape.layers[layer_plan.index], layer_plan, layer_plan.routed, origin)
        for unit in (unit for unit in layer_plan.units if unit not in ("bypass", "routed")):
            _check_units(shape.layers[layer_plan.index], layer_plan, unit, origin)
    parameters = plan_parameters(shape, plan)
    return replace(plan, parameters=parameters, parameter_bound=parameters)


def _check_units(layer: LayerShape, plan: LayerPlan, unit: UnitName, origin: str) -> None:
    units, kept, (what, where) = layer.units.get(unit), plan.units[unit], _UNITS[unit]
    if units is None:
        raise PlanError(f"{origin}: layer {plan.index} has {what}, but its {where} is none of which {what} can be cut.")
    if kept > units.count:
        raise PlanError(f"{origin}: layer {plan.index} keeps {kept} {what}, but its {where} has {units.count}.")
    if isinstance(units, Experts) and kept % WIDTH_MULTIPLE and kept != units.count:
        raise PlanError(
            f"{origin}: layer {plan.index} keeps {kept} {what}; allowed: multiples of {WIDTH_MULTIPLE}, because "
            "kernels for experts take no others."
        )
    both = [name for name in units.linears if name in plan.ranks] if isinstance(units, Units) else []
    if both:
        raise PlanError(f"{origin}: layer {plan.index} has {what} and a rank for '{both[0]}'; give one of the two.")


def _check_routed(layer: LayerShape, plan: LayerPlan, count: int, origin: str) -> None:
    experts = layer.experts
    if experts is None or not experts.router:
        raise PlanError(f"{origin}: layer {plan.index} keeps {count} experts, but it has none that can go.")
    if not experts.chosen <= count <= experts.number:
        raise PlanError(
            f"{origin}: layer {plan.index} keeps {count} experts; allowed: {experts.chosen} (as many as a token goes "
            f"through) to {experts.number}."
        )
    if plan.experts is not None:
        raise PlanError(
            f"{origin}: layer {plan.index} has fewer experts and fewer channels in each; give one of the two."
        )


def _check_bypass(layer: LayerShape, plan: LayerPlan, rank: int, origin: str) -> None:
    bypass = layer.bypass
    if bypass is None:
        raise PlanError(f"{origin}: layer {plan.index} has a bypass, but it has no MLP that one can take the place of.")
    if rank > bypass.hidden:
        raise PlanError(
            f"{origin}: layer {plan.index} has a bypass of rank {rank}; allowed: 1 to {bypass.hidden}, the hidden size."
        )
    inside = [name for name in plan.ranks if name.startswith(f"{bypass.module}.")]
    if inside or plan.channels is not None:
        raise PlanError(
            f"{origin}: layer {plan.index} has a bypass, which takes the place of its MLP, and also "
            f"{f'a rank for {inside[0]!r}' if inside else 'channels'}; give one of the two."
        )


def plan_to_search(
    shape: ModelShape, chosen: Collection[int], budget: BudgetConfig, method: str, bounds: Mapping[str, float]
) -> SurgeryPlan:
    """Return the plan in which the `chosen` layers may lose something, and a search is to say what.

    Its number of parameters is the bound; `bounds` are those in other resources. With a budget of 0 it is as
    `make_plan` makes it.
    """
    parameters = sum(shape.layers[index].parameters for index in chosen)
    bound = parameter_bound(budget, shape, parameters)
    if _nothing_stays(budget, bound == shape.parameters - parameters) and not bounds:
        return make_plan(shape, sorted(chosen), budget, method)
    _check_linears(shape, chosen)
    layers = [LayerPlan(index=i, action="reduce" if i in chosen else "keep") for i in range(len(shape.layers))]
    return replace(_plan(method, layers, bound, bound), bounds=dict(bounds))


def runs_behind_a_layer(plan: SurgeryPlan) -> list[tuple[int, int]]:
    """Return the plan's removed runs, for a method that puts something into the layer before each.

    Raises `PlanError` if layer 0 is removed.
    """
    if plan.layers[0].action == "remove":
        raise PlanError(
            f"--method {plan.method} needs a layer before each removed run, but layer 0 is removed; name --layers "
            "without it, or take another --method."
        )
    return plan.removed_runs


def parameter_bound(budget: BudgetConfig, shape: ModelShape, operated: int) -> int:
    """Return how many parameters the result may have; `operated` are now in layers that change."""
    total = shape.parameters
    if budget.target_size is not None:
        return max(0, min(total, total - -(-(shape.size_bytes - budget.target_size) // shape.itemsize)))
    if budget.target_parameters is None and budget.keep is None and budget.other_targets:
        return total
    if budget.target_parameters is None:
        keep = budget.DEFAULT_KEEP if budget.keep is None else budget.keep
        return total - operated + _share(keep, operated)
    return _share(budget.target_parameters, total)


def _nothing_stays(budget: BudgetConfig, reached: bool) -> bool:
    """Return whether a budget asks for nothing to stay of the layers: `reached`, if it is in parameters of the model.

    A `--keep` above 0 asks for something, however little, and is refused where it comes to no parameter at all.
    """
    if budget.target_parameters is None and budget.target_size is None:
        return budget.keep == 0
    return reached


def _share(fraction: float, count: int) -> int:
    """Return `fraction * count` rounded down, exactly, for the decimal fraction that was written: 0.3 of 10 is 3."""
    return math.floor(Fraction(repr(float(fraction))) * count)


def _up(fraction: float) -> str:
    """Return a fraction in four digits, rounded up, so that it is itself allowed."""
    return f"{math.ceil(fraction * 1e4) / 1e4:.4f}"


def _plan(method: str, layers: list[LayerPlan], parameters: int, bound: int) -> SurgeryPlan:
    whole = sum(layer.action == "keep" for layer in layers)
    return SurgeryPlan(method=method, target_layers=whole, layers=layers, parameters=parameters, parameter_bound=bound)
