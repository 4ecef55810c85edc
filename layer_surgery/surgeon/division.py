"""The division of the budgets: what each part of the layers can be cut to, searched for what is worth most nats."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Literal

import numpy as np

from layer_surgery.calibration.statistics import Statistics
from layer_surgery.checkpoint.architectures import Architecture
from layer_surgery.config import DEFAULT_COMPONENTS, UNIFORM_COMPONENTS, SearchConfig
from layer_surgery.devices import TILE_MULTIPLE
from layer_surgery.errors import PlanError
from layer_surgery.records import SurgeryPlan
from layer_surgery.surgeon.components import KINDS, PartOfLayer
from layer_surgery.surgeon.curves import Floats, Place
from layer_surgery.surgeon.plan import ModelShape
from layer_surgery.surgeon.resources import CACHE, OPTIONS, PARAMETERS, TIME, Pricing
from layer_surgery.surgeon.search import Found, UnreachableBudget, search

#: What is cut beside the default where a resource is limited that channels and ranks save little of.
_ALSO = {CACHE: ("heads", "attention"), TIME: ("attention", "mlp")}
#: Largest default of `--multiple`, and the share of the hidden size that it is at most.
_LARGEST_MULTIPLE, _SHARE_OF_HIDDEN = TILE_MULTIPLE, 16


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
    multiple = _multiple_for(options, shape.hidden_size)
    parts = list(_parts_of([layer.index for layer in plan.smaller], shape, architecture, multiple, pricing, statistics))
    budgets = {PARAMETERS: float(plan.parameter_bound), **plan.bounds}
    kinds = _kinds_for(options, plan.bounds)
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
    places = _places_of(parts, kinds, uniform=options.uniform)
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


def _parts_of(
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


def _places_of(parts: Collection[PartOfLayer], kinds: Collection[str], *, uniform: bool) -> list[Place]:
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


def _kinds_for(options: SearchConfig, limited: Collection[str]) -> tuple[str, ...]:
    """Return the kinds that the user names, or those that the limited resources need."""
    if options.components is not None:
        return options.components
    also = [kind for resource in limited for kind in _ALSO.get(resource, ())]
    return tuple(dict.fromkeys([*DEFAULT_COMPONENTS, *also]))


def _multiple_for(options: SearchConfig, hidden_size: int) -> int:
    """Return the multiple that the user names, or the power of two that suits the hidden size."""
    if options.multiple is not None:
        return options.multiple
    return min(_LARGEST_MULTIPLE, 1 << max(0, (hidden_size // _SHARE_OF_HIDDEN).bit_length() - 1))


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
