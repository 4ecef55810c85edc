"""Statistics of every linear from one walk over the calibration data: its components in the metric of the task loss.

The second moments of a layer exist only while the walk is at that layer. What stays is the spectrum of each linear and
its leading components, as many as can be of use, so that another target, budget or plan needs no new walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.calibration.bypass import MapWorth, best_map, bias_of
from layer_surgery.calibration.couplings import LEVELS, PART_LEVEL, Couplings, Responses
from layer_surgery.calibration.damping import damped
from layer_surgery.calibration.expert_channels import expert_orders, kept_channels, on_some_channels
from layer_surgery.calibration.units import UnitOrder, Units, attention_heads, mlp_channels
from layer_surgery.checkpoint.bypass import Bypass, bypass_of
from layer_surgery.checkpoint.experts import Experts, experts_of
from layer_surgery.checkpoint.modeling_layer_surgery import IN_FACTOR, OUT_FACTOR
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import DataError
from layer_surgery.journal import NO_STEPS, Finished, Steps
from layer_surgery.linalg.blockwise_nystrom import blockwise_column_order
from layer_surgery.linalg.decomposition import takes_leading
from layer_surgery.linalg.leading import leading_whitened_svd
from layer_surgery.linalg.low_rank import Factors, knapsack, no_components, whitened_svd
from layer_surgery.linalg.nystrom import ColumnOrder, column_order, narrowed
from layer_surgery.records import Part
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.expert_moments import ExpertMoments, ExpertRecorder
from layer_surgery.walk.moments import LayerMoments, MapRecorder, MomentRecorder
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Observer, Walk

Ranks = Mapping[str, int]
Size = tuple[int, int]  # (out, in)
#: How often ranks are chosen anew after what they leave of each other.
_ROUNDS = 4
#: Names, behind that of an MLP, of the means of what it reads and gives.
_MEANS = ("mean_input", "mean_output")


@dataclass
class Statistics:
    """Spectra of linears in the Kronecker-factored Fisher metric, and where their components are."""

    components: FactorStore
    loss_scale: float
    """Tokens per token that carries loss: moments are means over all tokens, a loss over those that carry it."""
    sizes: dict[int, dict[str, Size]] = field(default_factory=dict)  #: (out, in) of the linears, by layer and name.
    values: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """Singular values in the metric, in descending order. Of wide linears, those behind `ranks` are the root mean
    square of the rest, so that what a cut to any rank up to that costs is right."""
    ranks: dict[int, dict[str, int]] = field(default_factory=dict)  #: How many components of each are kept.
    channels: dict[int, UnitOrder] = field(default_factory=dict)
    """Channels of the MLPs that can be cut, by layer; moments are means over all tokens, as for `values`."""
    heads: dict[int, UnitOrder] = field(default_factory=dict)  #: The same of attentions, each head with its queries.
    experts: dict[int, list[UnitOrder]] = field(default_factory=dict)
    """The same of the channels of every expert of a layer, by layer."""
    maps: dict[int, MapWorth] = field(default_factory=dict)
    """The linear maps that may stand for MLPs, by layer, if they were asked for; their tensors are with the components,
    under the name of the MLP."""
    couplings: Couplings = field(default_factory=Couplings)
    fed_by: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """For each output projection, the linears whose outputs it reads."""

    @classmethod
    def empty(cls, walk: Walk, components: FactorStore) -> Statistics:
        """Return statistics of no linear yet, for what a walk goes over."""
        architecture = walk.model.architecture
        fed_by = {names[-1]: names[:-1] for names in (architecture.attention, architecture.mlp) if names}
        return cls(components, int(walk.all_tokens.valid.sum()) / walk.all_tokens.predicted_tokens, fed_by=fed_by)

    def covers(self, layers: Mapping[int, Ranks]) -> bool:
        """Return whether all of these components are there."""
        return all(
            rank <= self.ranks.get(index, {}).get(name, 0)
            for index, ranks in layers.items()
            for name, rank in ranks.items()
        )

    def factors(self, index: int, ranks: Ranks) -> dict[str, Factors]:
        """Return the leading components of some linears of a layer."""
        tensors = self.components.read(index)
        return {
            name: Factors(tensors[f"{name}.{OUT_FACTOR}"][:, :rank], tensors[f"{name}.{IN_FACTOR}"][:rank])
            for name, rank in ranks.items()
        }

    def map_tensors(self, index: int, module: str, rank: int) -> dict[str, Tensor]:
        """Return the tensors of the best linear map of this rank in the place of an MLP: its factors and its bias."""
        tensors = self.components.read(index)
        left, right = tensors[f"{module}.{OUT_FACTOR}"][:, :rank], tensors[f"{module}.{IN_FACTOR}"][:rank]
        means = (tensors[f"{module}.{name}"] for name in _MEANS)
        return {OUT_FACTOR: left, IN_FACTOR: right, "bias": bias_of((left, right), *means)}

    def cost(self, index: int, ranks: Ranks) -> float:
        """Return the predicted rise of the loss if linears of a layer are cut to these ranks, in nats per token.

        To second order: a component that is left out costs `1/2 value^2`.
        """
        left_out = sum(sum(v**2 for v in self.values[index][name][rank:]) for name, rank in ranks.items())
        return 0.5 * left_out * self.loss_scale

    def layer_ranks(self, index: int, keep: float, parameters: int) -> dict[str, int]:
        """Return the best ranks of a layer by itself if a fraction `keep` of its `parameters` goes to its factors.

        At least one rank in each linear.
        """
        least = sum(map(sum, self.sizes[index].values()))
        return self.best_ranks({index: self.sizes[index]}, max(least, int(keep * parameters)))[index]

    def best_ranks(self, linears: Mapping[int, Iterable[str]], budget: int) -> dict[int, dict[str, int]]:
        """Return a rank for each of these linears by one knapsack, with at most `budget` parameters in all factors.

        A component of an output projection is worth `1/2 value^2` only as far as what feeds it is still there, so the
        knapsack is solved again with what the last solution leaves of its inputs.
        """
        keys = [(index, name) for index, names in linears.items() for name in names]
        costs = [sum(self.sizes[index][name]) for index, name in keys]
        limits = [self.ranks[index][name] for index, name in keys]
        faithful = dict.fromkeys(keys, 1.0)
        ranks: dict[tuple[int, str], int] = {}
        for _ in range(_ROUNDS):
            values = [[v * faithful[i, name] ** 0.5 for v in self.values[i][name]] for i, name in keys]
            ranks = dict(zip(keys, knapsack(values, costs, limits, budget), strict=True))
            for i, name in keys:
                feeding = [(i, other) for other in self.fed_by.get(name, ()) if (i, other) in ranks]
                faithful[i, name] = min((self._kept_share(*key, ranks[key]) for key in feeding), default=1.0)
        result: dict[int, dict[str, int]] = {index: {} for index in linears}
        for (index, name), rank in ranks.items():
            result[index][name] = rank
        return result

    def of_layer(self, index: int) -> dict[str, Any]:
        """Return what is known of one layer, but for couplings and tensors, as JSON."""
        lone: dict[str, Mapping[int, Any]] = {"channels": self.channels, "heads": self.heads, "maps": self.maps}
        return {
            "sizes": self.sizes[index],
            "values": self.values[index],
            "ranks": self.ranks[index],
            "experts": [asdict(order) for order in self.experts[index]] if index in self.experts else None,
            **{name: asdict(of[index]) if index in of else None for name, of in lone.items()},
        }

    def put(self, index: int, layer: Mapping[str, Any]) -> None:
        """Take what `of_layer` has given in an earlier run."""
        self.sizes[index] = {name: (int(out), int(in_)) for name, (out, in_) in layer["sizes"].items()}
        self.values[index], self.ranks[index] = layer["values"], layer["ranks"]
        for name, orders in (("channels", self.channels), ("heads", self.heads)):
            if layer[name] is not None:
                orders[index] = UnitOrder(**layer[name])
        if layer["experts"] is not None:
            self.experts[index] = [UnitOrder(**order) for order in layer["experts"]]
        if layer["maps"] is not None:
            self.maps[index] = MapWorth(**layer["maps"])

    def _kept_share(self, index: int, name: str, rank: int) -> float:
        """Return how much of a linear's worth its first components hold, 0 to 1."""
        worth = [value**2 for value in self.values[index][name]]
        return sum(worth[:rank]) / (sum(worth) or 1.0)


def replaceable_linears(model: StreamedModel, index: int, part: Part = "layer") -> dict[str, Size]:
    """Return (out, in) of the linears of a layer, or of a part of it, that surgery can replace.

    Those that are low-rank already are not among them.
    """
    names = model.architecture.linears_of(part)
    linears = {}
    for name, module in model.layers[index].named_modules():
        if name in names and isinstance(module, nn.Linear):
            linears[name] = (module.out_features, module.in_features)
    return {name: linears[name] for name in names if name in linears}


def useful_rank(size: Size) -> int:
    """Return the largest rank whose factors take no more parameters than the dense weight (at least 1)."""
    out, in_ = size
    return max(1, out * in_ // (out + in_))


def useful_ranks(model: StreamedModel, layers: Iterable[int], part: Part = "layer") -> dict[int, dict[str, int]]:
    """Return the largest useful rank of every replaceable linear of some layers."""
    return {
        index: {name: useful_rank(size) for name, size in replaceable_linears(model, index, part).items()}
        for index in layers
    }


def check_tokens(tokens: PackedTokens, hidden_size: int, what: str) -> None:
    """Raise `DataError` if there are too few calibration tokens for second moments to mean anything."""
    count = int(tokens.valid.sum())
    if count < hidden_size:
        samples = -(-hidden_size // tokens.sequence_length)
        raise DataError(
            f"{what} needs at least as many calibration tokens as the model is wide, {hidden_size:,}, but there are "
            f"{count:,}; give --samples {samples} or more at this --sequence-length (many more are better)."
        )


def collect(
    walk: Walk,
    statistics: Statistics,
    layers: Mapping[int, Ranks],
    part: Part = "layer",
    *,
    maps: bool = False,
    forward: Steps = NO_STEPS,
    steps: Steps = NO_STEPS,
) -> None:
    """Fill `statistics` with the components of these linears, up to these ranks, by one forward and backward walk.

    Also with the couplings of the layers, or of a part of each, and with `maps` with the linear maps for MLPs. Layers
    that are finished in `forward` and `steps` are not run again; the components are then in a folder of `steps`.
    """
    if not layers:
        return
    check_tokens(walk.all_tokens, walk.model.hidden_size, "the fisher metric")
    observer = _Collector(walk, statistics, layers, part, maps)
    walk.backpropagate([observer], watch=layers, forward=forward, steps=steps)
    statistics.couplings = observer.couplings()


class MomentObserver(Observer):
    """Takes the second moments of some linears of each layer that it sees, and reduces them behind the layer."""

    def __init__(
        self,
        layers: Mapping[int, Iterable[str]],
        *,
        gradients: bool,
        experts: Mapping[int, Experts] | None = None,
    ) -> None:
        """Look at these linears, by layer; with `gradients`, also at the loss gradients at their outputs.

        And, in layers that are named there, at the experts.
        """
        self._linears, self._gradients, self._experts = layers, gradients, experts or {}
        self.owner_of: dict[str, int] = {}
        """Of the layer at hand, the process that each linear, or the experts' module, belongs to."""
        self._recorders: list[MomentRecorder | ExpertRecorder | MapRecorder] = []

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        linears = {name: layer.get_submodule(name) for name in self._linears.get(index, ())}
        experts = self._experts.get(index)
        self.owner_of = _owners(layer, linears, experts)
        of_linears = MomentRecorder(linears, gradients=self._gradients, owner_of=self.owner_of)
        self._recorders, of_experts = [of_linears], None
        with ExitStack() as recording:
            moments = recording.enter_context(of_linears.recording())
            if experts is not None:
                module, owner = layer.get_submodule(experts.module), self.owner_of[experts.module]
                of_experts = ExpertRecorder(experts, module, gradients=self._gradients, owner=owner)
                recording.enter_context(of_experts.recording())
                self._recorders.append(of_experts)
            yield
        for recorder in self._recorders:
            recorder.finish()
        self.reduce(index, layer, moments)
        if experts is not None and of_experts is not None:
            mine = self.owner_of[experts.module] == parallel.group().rank
            self.reduce_experts(index, layer, experts, of_experts.moments if mine else None)
        self.complete(index, layer)

    def batch(self, valid: Tensor) -> None:
        for recorder in self._recorders:
            recorder.start_batch(valid)

    def end_round(self, present: int) -> None:
        for recorder in self._recorders:
            recorder.end_round(present)

    def reduce(self, index: int, layer: nn.Module, moments: LayerMoments) -> None:
        """Make of the moments what is wanted of them; the layer still has its weights.

        Those of linears that are not this process's own (`owner_of`) are not there.
        """
        raise NotImplementedError

    def reduce_experts(self, index: int, layer: nn.Module, experts: Experts, moments: ExpertMoments | None) -> None:
        """Do the same with those of the experts, afterwards; None if they are another process's."""
        raise NotImplementedError

    def complete(self, index: int, layer: nn.Module) -> None:
        """Do what is left to do with a layer, which still has its weights."""


def _owners(layer: nn.Module, linears: Mapping[str, nn.Module], experts: Experts | None) -> dict[str, int]:
    """Return the process that each linear of a layer, and the experts' module, belongs to: bins by their cost."""
    costs = {}
    for name, linear in linears.items():
        out, in_ = _size(linear.get_parameter("weight"))
        costs[name] = float(out * in_ * (out + in_) + out**3 + in_**3)
    if experts is not None:
        costs[experts.module] = float(experts.number * experts.count**3 + experts.hidden**3)
    return parallel.owners(costs)


def _size(weight: Tensor) -> Size:
    return int(weight.shape[0]), int(weight.shape[1])


class _Collector(MomentObserver):
    """Decomposes the linears of each layer that it sees, on the spot, and tries the layer with the components."""

    def __init__(self, walk: Walk, statistics: Statistics, layers: Mapping[int, Ranks], part: Part, maps: bool) -> None:
        found = {index: experts_of(walk.model.layers[index]) for index in layers if part == "layer"}
        known = {index: experts for index, experts in found.items() if experts is not None}
        super().__init__(layers, gradients=True, experts=known)
        self._walk, self._statistics, self._layers, self._part = walk, statistics, layers, part
        self._maps = maps and part == "layer"
        self._responses: Responses | None = None
        self._map: tuple[Bypass, MapRecorder] | None = None  # the MLP of the layer at hand
        self._half: dict[str, dict[str, Tensor]] = {}
        """By part, output projections of the layer at hand, by parameter, with half of the channels."""

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        bypass = bypass_of(layer, self._walk.model.architecture) if self._maps else None
        self._map = None
        with super().watching(index, layer), ExitStack() as recording:
            if bypass is not None and bypass.output in self._layers[index]:
                recorder = MapRecorder(layer.get_submodule(bypass.module), self.owner_of[bypass.output])
                recording.enter_context(recorder.recording())
                self._recorders.append(recorder)
                self._map = (bypass, recorder)
            yield

    def begin_backward(self, gradient: Boundary) -> None:
        self._responses = Responses(self._walk, gradient)

    def couplings(self) -> Couplings:
        """Return the couplings of the layers that it has seen."""
        assert self._responses is not None
        return self._responses.couplings()

    def reduce(self, index: int, layer: nn.Module, moments: LayerMoments) -> None:
        ranks, found = self._layers[index], self._statistics
        channels, heads = (units(layer, self._walk.model.architecture) for units in (mlp_channels, attention_heads))
        self._half = {}
        found.values[index], found.sizes[index], found.ranks[index] = {}, {}, dict(ranks)
        with parallel.together():
            for name, weight, inputs in weights_with_inputs(layer, parallel.own(self.owner_of, ranks), moments, index):
                outputs = damped(moments.output_moment(name), moments.tokens, index, name)
                if takes_leading(self._walk.settings.decomposition, *weight.shape):
                    (left, right), values = leading_whitened_svd(weight, inputs, outputs, ranks[name])
                else:
                    (left, right), values = whitened_svd(weight, inputs, outputs)
                found.components.write(index, {name: Factors(left[:, : ranks[name]], right[: ranks[name]])})
                found.values[index][name] = values.tolist()
                found.sizes[index][name] = _size(weight)
                for units, orders in ((channels, found.channels), (heads, found.heads)):
                    if units is not None and name == units.output:
                        order = self._order(weight, inputs, outputs, units.size)
                        orders[index] = found_order = UnitOrder(order.order.tolist(), order.gains.tolist())
                        if units is channels:
                            kept = found_order.kept(int(PART_LEVEL * units.count))
                            self._half["mlp"] = {f"{name}.weight": _on_some(weight, inputs, kept)}

            if self._map is not None and self.owner_of[self._map[0].output] == parallel.group().rank:
                self._reduce_map(index, *self._map, moments)
        self._share(index, layer, channels)

    def finish(self, index: int, steps: Steps, passing: Callable[[Path], object]) -> None:
        assert self._responses is not None
        steps.finish(
            str(index),
            self._statistics.of_layer(index),
            kept=partial(save_file, {name: each.contiguous() for name, each in self._responses.of(index).items()}),
            passing=passing,
        )

    def restore(self, index: int, step: Finished) -> None:
        assert self._responses is not None
        self._statistics.put(index, step.record)
        self._responses.put(index, load_file(step.kept))

    def _share(self, index: int, layer: nn.Module, channels: Units | None) -> None:
        """Have all processes know what the owners of the linears of a layer have found; alone, change nothing."""
        if parallel.group().world == 1:
            return
        found, owner_of = self._statistics, self.owner_of
        values = parallel.by_owner({name: owner_of[name] for name in self._layers[index]}, found.values[index])
        found.values[index] = values
        found.sizes[index] = {name: _size(layer.get_parameter(f"{name}.weight")) for name in values}
        for kind in (found.channels, found.heads):
            own = asdict(kind[index]) if index in kind else None
            if order := next(filter(None, parallel.gather(own)), None):
                kind[index] = UnitOrder(**order)
        worth = asdict(found.maps[index]) if index in found.maps else None
        if other := next(filter(None, parallel.gather(worth)), None):
            found.maps[index] = MapWorth(**other)
        if channels is not None and channels.output in owner_of:
            name = f"{channels.output}.weight"
            half = self._half.get("mlp", {}).get(name)
            self._half["mlp"] = {name: parallel.broadcast(half, owner_of[channels.output], self._walk.model.device)}

    def _order(self, weight: Tensor, inputs: Tensor, outputs: Tensor, size: int) -> ColumnOrder:
        """Return the order in which to keep the units of an output projection, of so many inputs each."""
        if size > 1:
            return column_order(weight, inputs, outputs, size)
        if takes_leading(self._walk.settings.decomposition, *weight.shape):
            return blockwise_column_order(weight, inputs, outputs)
        return column_order(weight, inputs, outputs)

    def _reduce_map(self, index: int, bypass: Bypass, recorder: MapRecorder, moments: LayerMoments) -> None:
        assert recorder.sums is not None
        gradients = damped(moments.output_moment(bypass.output), moments.tokens, index, bypass.output)
        found = best_map(recorder.sums, gradients, index, bypass.module)
        left, right = found.factors
        means = dict(zip(_MEANS, (found.mean_input, found.mean_output), strict=True))
        tensors = {OUT_FACTOR: left, IN_FACTOR: right, **means}
        self._statistics.components.write_tensors(index, bypass.module, tensors)
        self._statistics.maps[index] = found.worth

    def reduce_experts(self, index: int, layer: nn.Module, experts: Experts, moments: ExpertMoments | None) -> None:
        module, owner = layer.get_submodule(experts.module), self.owner_of[experts.module]
        orders, half = list[UnitOrder](), None
        with parallel.together():
            if moments is not None:
                orders = expert_orders(experts, module, moments, index, self._walk.settings.decomposition)
                kept = kept_channels(orders, int(PART_LEVEL * experts.count))
                half = on_some_channels(experts, module, moments, kept, index)
        if parallel.group().world > 1:
            orders = [UnitOrder(**order) for order in parallel.gather([asdict(order) for order in orders])[owner]]
        self._statistics.experts[index] = orders
        self._half["experts"] = {experts.output: parallel.broadcast(half, owner, self._walk.model.device)}

    def complete(self, index: int, layer: nn.Module) -> None:
        self._try(index, layer)
        self._try_parts(index, layer)
        self._half = {}

    def _try_parts(self, index: int, layer: nn.Module) -> None:
        """Measure what comes of the layer with `PART_LEVEL` of its attention, with that of its MLP, of its experts."""
        assert self._responses is not None
        names, sizes = self._walk.model.architecture, self._statistics.sizes[index]
        for part, linears in (("attention", names.attention), ("mlp", names.mlp)):
            present = [name for name in linears if name in sizes]
            if not present:
                continue
            weights = self._half.get(part, {})
            if not weights:
                least, most = sum(sum(sizes[name]) for name in present), sum(prod(sizes[name]) for name in present)
                budget = max(least, int(PART_LEVEL * most))
                ranks = self._statistics.best_ranks({index: present}, budget)[index]
                weights = _products(layer, self._statistics.factors(index, ranks))
            with composed(layer, weights):
                self._responses.add_part(index, part, layer)
        if "experts" in self._half:
            with composed(layer, self._half["experts"]):
                self._responses.add_part(index, "experts", layer)

    def _try(self, index: int, layer: nn.Module) -> None:
        """Measure what comes of the layer, or of its part, with components at each level of `LEVELS`; 0 is without."""
        assert self._responses is not None
        sizes = self._statistics.sizes[index]
        parameters = sum(p.numel() for p in layer.parameters())
        if self._part == "layer":
            self._responses.add(index, 0.0, None)
        else:
            parameters = sum(out * in_ for out, in_ in sizes.values())
            nothing = {name: no_components(size) for name, size in sizes.items()}
            with composed(layer, _products(layer, nothing)):
                self._responses.add(index, 0.0, layer)
        for keep in LEVELS[1:]:
            ranks = self._statistics.layer_ranks(index, keep, parameters)
            with composed(layer, _products(layer, self._statistics.factors(index, ranks))):
                self._responses.add(index, keep, layer)


@contextmanager
def composed(layer: nn.Module, others: Mapping[str, Tensor]) -> Iterator[None]:
    """Put others in the place of parameters, by name, for the duration of the block."""
    weights = {name: layer.get_parameter(name) for name in others}
    originals = {name: weight.data for name, weight in weights.items()}
    try:
        for name, other in others.items():
            weights[name].data = other.to(weights[name])
        yield
    finally:
        for name, weight in weights.items():
            weight.data = originals[name]


def _products(layer: nn.Module, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return the weights that factors make, by parameter, multiplied in the dtype of computation."""
    like = {name: layer.get_parameter(f"{name}.weight") for name in factors}
    return {f"{name}.weight": left.to(like[name]) @ right.to(like[name]) for name, (left, right) in factors.items()}


def _on_some(weight: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """Return the best weight [out, in] that has the columns `kept` only; the others are 0."""
    some = torch.zeros_like(weight)
    some[:, kept] = narrowed(weight, inputs, kept).to(weight)
    return some


def weights_with_inputs(
    layer: nn.Module, names: Iterable[str], moments: LayerMoments, index: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each linear's name, weight [out, in] and damped second moment of its inputs [in, in], float64."""
    inputs: dict[str, Tensor] = {}  # by the first linear that read the input
    for name in names:
        reader = moments.reads[name]
        if reader not in inputs:
            inputs[reader] = damped(moments.input_moment(name), moments.tokens, index, name)
        yield name, layer.get_parameter(f"{name}.weight").detach(), inputs[reader]
