"""Truncations in the metric of the data: activations alone (SVD-LLM), or activations and loss gradients (Fisher).

Wang et al., SVD-LLM (https://arxiv.org/abs/2403.07378). For both sides, the Kronecker-factored Fisher metric of
Martens & Grosse (https://arxiv.org/abs/1503.05671), in SVD compression GFWSVD (https://arxiv.org/abs/2505.17974).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from layer_surgery.errors import NumericalError
from layer_surgery.low_rank import Factors, knapsack, shrunk, whitened_svd
from layer_surgery.moments import MomentRecorder
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext, the_walk
from layer_surgery.surgeon.factors import FactorStore
from layer_surgery.walk import Observer


class WhitenedObserver(Observer):
    """Decomposes the linears of each layer that it sees, on the spot, and keeps their leading components."""

    def __init__(self, limits: Mapping[int, Mapping[str, int]], components: FactorStore, *, gradients: bool) -> None:
        self._limits, self._components, self._gradients = limits, components, gradients
        self._recorder: MomentRecorder | None = None
        self.values: dict[int, dict[str, list[float]]] = {}
        """Singular values in the metric, by layer and linear; leaving one out costs `1/2 value^2` nats per token."""

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        linears = {name: layer.get_submodule(name) for name in self._limits[index]}
        self._recorder = MomentRecorder(linears, gradients=self._gradients)
        with self._recorder.recording() as moments:
            yield
        self.values[index] = {}
        damped: dict[str, Tensor] = {}
        for name, limit in self._limits[index].items():
            reader = moments.reads[name]
            if reader not in damped:
                damped[reader] = shrunk(_finite(moments.input_moment(name), index, name), moments.tokens)
            outputs = None
            if self._gradients:
                outputs = shrunk(_finite(moments.output_moment(name), index, name), moments.tokens)
            weight = layer.get_parameter(f"{name}.weight").detach()
            (left, right), values = whitened_svd(weight, damped[reader], outputs)
            self._components.write(index, {name: Factors(left[:, :limit], right[:limit])})
            self.values[index][name] = values.tolist()

    def batch(self, valid: Tensor) -> None:
        assert self._recorder is not None
        self._recorder.start_batch(valid)


@METHODS.add(
    "svd_llm",
    summary="truncated SVD that changes the outputs on the calibration data least (SVD-LLM)",
    source="https://arxiv.org/abs/2403.07378",
    needs_data=True,
)
def svd_llm(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Truncate each linear in the metric of its inputs' second moment, at the plan's ranks."""
    ranks = {layer.index: layer.ranks for layer in plan.low_rank}
    path = list(range(max(ranks) + 1))
    observer = WhitenedObserver(ranks, context.factors, gradients=False)
    the_walk(context).forward(path, keep=False, observers=[observer], watch=ranks)
    return plan


@METHODS.add(
    "fisher",
    summary="truncated SVD in the Kronecker-factored Fisher metric, ranks by one knapsack over all matrices",
    source="https://arxiv.org/abs/2505.17974",
    needs_boundaries=True,
)
def fisher(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Keep the components that are worth most nats per parameter; return the plan with the ranks that this gives.

    Ranks that the user gave (`context.ranks_fixed`) are kept as they are.
    """
    walk = the_walk(context)
    sizes = {layer.index: _sizes(context, layer) for layer in plan.low_rank}
    limits = {layer.index: _limits(layer, sizes[layer.index], context.ranks_fixed) for layer in plan.low_rank}
    directory = context.factors.directory / "components"
    directory.mkdir()
    components = FactorStore(directory, walk.store.dtype)
    observer = WhitenedObserver(limits, components, gradients=True)
    path = list(range(context.model.layer_count))
    with walk.new_store(walk.settings.boundary_memory_bytes) as gradient:
        walk.losses(walk.forward(path, keep=True), gradient=(gradient, 0))
        walk.backward(path, (gradient, 0), stop=min(limits), observers=[observer], watch=limits)
    ranks = planned = {layer.index: layer.ranks for layer in plan.low_rank}
    if not context.ranks_fixed:
        ranks = _best_ranks(plan, sizes, limits, observer.values)
    for index in ranks:
        tensors = components.read(index)
        for name, rank in ranks[index].items():
            left, right = tensors[f"{name}.out_factor.weight"], tensors[f"{name}.in_factor.weight"]
            context.factors.write(index, {name: Factors(left[:, :rank], right[:rank])})
    layers = [replace(layer, ranks=ranks.get(layer.index, {})) for layer in plan.layers]
    # The moments are means over all tokens, prompts included (they get gradients through attention); a loss is a mean
    # over the tokens that carry it. Layers removed outright are not in the prediction, so then there is none.
    removed = any(layer.action == "remove" for layer in plan.layers)
    tokens = walk.tokens
    predicted = (int(tokens.valid.sum()) / tokens.predicted_tokens) * sum(
        0.5 * sum(value**2 for value in observer.values[index][name][rank:])
        for index, by_name in ranks.items()
        for name, rank in by_name.items()
    )
    return replace(
        plan,
        layers=layers,
        parameters=plan.parameters + _cost(ranks, sizes) - _cost(planned, sizes),
        predicted_loss_rise=None if removed else round(predicted, 6),
    )


def _sizes(context: SurgeryContext, layer: LayerPlan) -> dict[str, tuple[int, int]]:
    """Return (out, in) of the linears that the plan replaces."""
    module = context.model.layers[layer.index]
    shapes = {name: module.get_parameter(f"{name}.weight").shape for name in layer.ranks}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def _limits(layer: LayerPlan, sizes: Mapping[str, tuple[int, int]], ranks_fixed: bool) -> dict[str, int]:
    """Return the largest rank of each linear that can be of use: beyond it factors take more than the dense weight."""
    if ranks_fixed:
        return dict(layer.ranks)
    return {name: max(layer.ranks[name], out * in_ // (out + in_)) for name, (out, in_) in sizes.items()}


def _best_ranks(
    plan: SurgeryPlan,
    sizes: Mapping[int, Mapping[str, tuple[int, int]]],
    limits: Mapping[int, Mapping[str, int]],
    values: Mapping[int, Mapping[str, list[float]]],
) -> dict[int, dict[str, int]]:
    """Return ranks by one knapsack over all matrices, within the plan's bound."""
    keys = [(index, name) for index in sizes for name in sizes[index]]
    costs = [sum(sizes[index][name]) for index, name in keys]
    budget = (
        _cost({layer.index: layer.ranks for layer in plan.low_rank}, sizes) + plan.parameter_bound - plan.parameters
    )
    ranks = knapsack([values[i][n] for i, n in keys], costs, [limits[i][n] for i, n in keys], budget)
    result: dict[int, dict[str, int]] = {index: {} for index in sizes}
    for (index, name), rank in zip(keys, ranks, strict=True):
        result[index][name] = rank
    return result


def _cost(ranks: Mapping[int, Mapping[str, int]], sizes: Mapping[int, Mapping[str, tuple[int, int]]]) -> int:
    """Return the parameters of all factors."""
    return sum(rank * sum(sizes[index][name]) for index in ranks for name, rank in ranks[index].items())


def _finite(moment: Tensor, index: int, name: str) -> Tensor:
    if not moment.isfinite().all():
        raise NumericalError(f"a second moment of '{name}' in layer {index} is not finite; try --dtype float32.")
    return moment.double()
