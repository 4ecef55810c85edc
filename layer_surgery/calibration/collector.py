"""One forward and backward walk that fills `Statistics`: each layer is decomposed on the spot, and tried with less.

The second moments of a layer exist only while the walk is at that layer. What stays is the spectrum of each linear and
its leading components, as many as can be of use, so that another target, budget or plan needs no new walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.calibration.bypass import MapWorth, best_map
from layer_surgery.calibration.couplings import LEVELS, PART_LEVEL, Couplings, Responses
from layer_surgery.calibration.damping import damped
from layer_surgery.calibration.expert_channels import expert_orders, kept_channels, on_some_channels
from layer_surgery.calibration.moment_observer import MomentObserver, size_of, weights_with_inputs
from layer_surgery.calibration.statistics import MEANS, Ranks, Statistics, check_tokens
from layer_surgery.calibration.units import UnitOrder, Units, attention_heads, mlp_channels
from layer_surgery.checkpoint.bypass import Bypass, bypass_of
from layer_surgery.checkpoint.experts import Experts, experts_of
from layer_surgery.checkpoint.modeling_layer_surgery import IN_FACTOR, OUT_FACTOR
from layer_surgery.journal import NO_STEPS, Finished, Steps
from layer_surgery.linalg.blockwise_nystrom import blockwise_column_order
from layer_surgery.linalg.decomposition import takes_leading
from layer_surgery.linalg.leading import leading_whitened_svd
from layer_surgery.linalg.low_rank import Factors, no_components, whitened_svd
from layer_surgery.linalg.nystrom import ColumnOrder, column_order, narrowed
from layer_surgery.records import Part
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.expert_moments import ExpertMoments
from layer_surgery.walk.moments import LayerMoments, MapRecorder
from layer_surgery.walk.walk import Walk


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
                self.recorders.append(recorder)
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
                found.sizes[index][name] = size_of(weight)
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
        found.sizes[index] = {name: size_of(layer.get_parameter(f"{name}.weight")) for name in values}
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
        means = dict(zip(MEANS, (found.mean_input, found.mean_output), strict=True))
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
