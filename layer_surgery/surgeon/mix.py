"""One search over the layers: channels of their MLPs, singular vectors of their other linears, one currency.

The channels of an MLP are chosen and its output projection is re-solved as in MoDeGPT (https://arxiv.org/abs/2408.09632),
but in the metric of the task loss (`linalg/nystrom.py`); singular vectors are those of the method `fisher`. Both are
priced in nats per token for a parameter, so one search (`search.py`) divides the budget among all of them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from torch import nn

from layer_surgery.calibration.channels import MlpChannels
from layer_surgery.calibration.statistics import (
    MomentObserver,
    Statistics,
    replaceable_linears,
    useful_rank,
    weights_with_inputs,
)
from layer_surgery.errors import PlanError
from layer_surgery.linalg.nystrom import narrowed
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext
from layer_surgery.surgeon.curves import Alternative, Curve, Place
from layer_surgery.surgeon.plan import ModelShape, plan_parameters
from layer_surgery.surgeon.search import Found, UnreachableBudget, search
from layer_surgery.surgeon.shape import model_shape
from layer_surgery.walk.moments import LayerMoments

URL = "https://arxiv.org/abs/2408.09632"
_PARAMETERS = "parameters"
_MLP, _LINEARS = "mlp", "linears"


@METHODS.add(
    "mix",
    summary="channels of MLPs and singular vectors of other linears by one search; of all layers with a lone "
    "--target-parameters",
    source=URL,
    needs_data=True,
    needs_boundaries=True,
    refits=True,
)
def mix(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Keep what is worth most nats per parameter in the layers of the plan; return the plan with what that is.

    Ranks and channels that the user gave (`context.ranks_fixed`) are kept as they are.
    """
    shape = model_shape(context.model.checkpoint)
    planned = {layer.index: layer for layer in plan.smaller}
    sizes = {index: replaceable_linears(context.model, index) for index in planned}
    most = {
        index: {name: max(useful_rank(size), planned[index].ranks.get(name, 0)) for name, size in linears.items()}
        for index, linears in sizes.items()
    }
    statistics = context.statistics.get(context.walk, most)
    if not context.ranks_fixed:
        plan = _searched(plan, shape, statistics, context)
    for layer in plan.low_rank:
        for name, factors in statistics.factors(layer.index, layer.ranks).items():
            values = statistics.values[layer.index][name]
            context.write(layer.index, name, factors, "fisher", values, layer.ranks[name])
    channels = {
        layer.index: (shape.layers[layer.index].channels, layer.channels)
        for layer in plan.smaller
        if layer.channels is not None
    }
    wanted = {index: (which, count) for index, (which, count) in channels.items() if which is not None}
    if wanted:
        observer = _Narrowing(wanted, statistics, context)
        context.walk.forward(range(max(wanted) + 1), keep=False, observers=[observer], watch=wanted)
    return plan


def _searched(plan: SurgeryPlan, shape: ModelShape, statistics: Statistics, context: SurgeryContext) -> SurgeryPlan:
    """Return the plan with the best mix within its bound."""
    options = context.search
    places = [place for layer in plan.smaller for place in _places(layer.index, shape, statistics, context)]
    whole = sum(float(place.alternatives[0].curves[0].prices[_PARAMETERS][0]) for place in places)
    removed = sum(shape.layers[layer.index].parameters for layer in plan.layers if layer.action == "remove")
    alike = [[place.name for place in places if place.name.endswith(f" {_MLP}")]] if options.uniform else []
    try:
        found = search(
            places,
            {_PARAMETERS: float(plan.parameter_bound)},
            fixed={_PARAMETERS: shape.parameters - removed - whole},
            alike=alike,
        )
    except UnreachableBudget as error:
        least = math.ceil(error.reachable[_PARAMETERS])
        raise PlanError(
            f"the budget of {plan.parameter_bound:,} parameters cannot be reached by cutting "
            f"{' and '.join(options.components)} in multiples of {options.multiple}; the smallest is {least:,} "
            f"(--target-parameters {math.ceil(1e4 * least / shape.parameters) / 1e4:g}); raise the budget, allow more "
            "--components, lower --multiple, or remove layers outright with --keep 0."
        ) from error
    layers = [
        _layer_plan(layer, shape, found) if layer.action in ("low_rank", "reduce") else layer for layer in plan.layers
    ]
    plan = replace(
        plan,
        layers=layers,
        target_layers=sum(layer.action == "keep" for layer in layers),
        predicted_loss_rise=None if removed else round(found.cost, 6),
    )
    return replace(plan, parameters=plan_parameters(shape, plan))


def _places(index: int, shape: ModelShape, statistics: Statistics, context: SurgeryContext) -> Iterator[Place]:
    """Yield the MLP of a layer, if its channels can be cut, and the other linears: each with its alternatives."""
    layer, options = shape.layers[index], context.search
    channels = layer.channels if "channels" in options.components and index in statistics.channels else None
    of_mlp = [channels.output, *channels.feeding] if channels is not None else []
    if channels is not None:
        whole = {_PARAMETERS: float(channels.width * channels.price)}
        costs = np.array(statistics.channels[index].costs()) * statistics.loss_scale
        curve = (
            Curve.linear(
                costs[: channels.width],
                {_PARAMETERS: float(channels.price)},
                multiple=options.multiple,
                least=min(options.multiple, channels.width - 1) or 1,
            )
            if channels.width > options.multiple
            else None
        )
        alternatives = [Alternative.single("whole", 0.0, whole)]
        if curve is not None:
            alternatives.append(Alternative("channels", (curve,)))
        yield Place(f"{index} {_MLP}", tuple(alternatives))
    rest = {name: size for name, size in statistics.sizes[index].items() if name not in of_mlp}
    if rest:
        whole = {_PARAMETERS: float(sum(out * in_ for out, in_ in rest.values()))}
        alternatives = [Alternative.single("whole", 0.0, whole)]
        if "singular" in options.components and not options.uniform:
            curves = tuple(_rank_curve(name, index, statistics, options.multiple) for name in rest)
            alternatives.append(Alternative("singular", curves))
        yield Place(f"{index} {_LINEARS}", tuple(alternatives))


def _rank_curve(name: str, index: int, statistics: Statistics, multiple: int) -> Curve:
    """Return the curve of the ranks of a linear; its last step, `out * in`, is the linear as it is."""
    out, in_ = statistics.sizes[index][name]
    worth = 0.5 * statistics.loss_scale * np.array(statistics.values[index][name]) ** 2
    costs = np.append(worth[::-1].cumsum()[::-1], 0.0)
    ranks = np.arange(multiple, min(useful_rank((out, in_)), statistics.ranks[index][name]) + 1, multiple)
    return Curve(
        np.append(ranks, out * in_),
        np.append(costs[ranks], 0.0),
        {_PARAMETERS: np.append(ranks * float(out + in_), float(out * in_))},
        name,
    )


def _layer_plan(layer: LayerPlan, shape: ModelShape, found: Found) -> LayerPlan:
    """Return what the search has chosen for a layer."""
    ranks: dict[str, int] = {}
    channels = None
    linears = found.choices.get(f"{layer.index} {_LINEARS}")
    if linears is not None and linears.kind == "singular":
        sizes = shape.layers[layer.index].linears
        ranks = {name: rank for name, rank in linears.steps.items() if rank < sizes[name][0] * sizes[name][1]}
    mlp = found.choices.get(f"{layer.index} {_MLP}")
    if mlp is not None and mlp.kind == "channels":
        (channels,) = mlp.steps.values()
    if channels is None and not ranks:
        return LayerPlan(index=layer.index, action="keep")
    return LayerPlan(
        index=layer.index, action="low_rank" if channels is None else "reduce", ranks=ranks, channels=channels
    )


class _Narrowing(MomentObserver):
    """Cuts the channels of each layer's MLP, and re-solves its output projection on those that stay."""

    def __init__(
        self, wanted: Mapping[int, tuple[MlpChannels, int]], statistics: Statistics, context: SurgeryContext
    ) -> None:
        super().__init__({index: [channels.output] for index, (channels, _count) in wanted.items()}, gradients=False)
        self._wanted, self._statistics, self._context = wanted, statistics, context

    def reduce(self, index: int, layer: nn.Module, moments: LayerMoments) -> None:
        channels, count = self._wanted[index]
        order = self._statistics.channels.get(index)
        if order is None:
            raise PlanError(f"the plan keeps {count} channels of layer {index}, but there are no statistics of them.")
        kept, store = order.kept(count), self._context.factors
        for name, weight, inputs in weights_with_inputs(layer, [channels.output], moments, index):
            store.write_tensors(index, name, {"weight": narrowed(weight, inputs, kept)})
        self._context.rows[index] = channels.rows(kept)
        for name, rows in self._context.rows[index].items():
            linear = layer.get_submodule(name)
            tensors = {part: tensor.detach()[rows] for part, tensor in linear.named_parameters()}
            store.write_tensors(index, name, tensors)
        self._context.record_channels(index, channels.output, order.gains, count)
