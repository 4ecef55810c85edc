"""The second moments of the linears and experts of each layer that a walk passes, for what reduces them on the spot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.calibration.damping import damped
from layer_surgery.checkpoint.experts import Experts
from layer_surgery.walk.expert_moments import ExpertMoments, ExpertRecorder
from layer_surgery.walk.moments import LayerMoments, MapRecorder, MomentRecorder
from layer_surgery.walk.observer import Observer


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
        self.recorders: list[MomentRecorder | ExpertRecorder | MapRecorder] = []

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        linears = {name: layer.get_submodule(name) for name in self._linears.get(index, ())}
        experts = self._experts.get(index)
        self.owner_of = _owners(layer, linears, experts)
        of_linears = MomentRecorder(linears, gradients=self._gradients, owner_of=self.owner_of)
        self.recorders, of_experts = [of_linears], None
        with ExitStack() as recording:
            moments = recording.enter_context(of_linears.recording())
            if experts is not None:
                module, owner = layer.get_submodule(experts.module), self.owner_of[experts.module]
                of_experts = ExpertRecorder(experts, module, gradients=self._gradients, owner=owner)
                recording.enter_context(of_experts.recording())
                self.recorders.append(of_experts)
            yield
        for recorder in self.recorders:
            recorder.finish()
        self.reduce(index, layer, moments)
        if experts is not None and of_experts is not None:
            mine = self.owner_of[experts.module] == parallel.group().rank
            self.reduce_experts(index, layer, experts, of_experts.moments if mine else None)
        self.complete(index, layer)

    def batch(self, valid: Tensor) -> None:
        for recorder in self.recorders:
            recorder.start_batch(valid)

    def end_round(self, present: int) -> None:
        for recorder in self.recorders:
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
        out, in_ = size_of(linear.get_parameter("weight"))
        costs[name] = float(out * in_ * (out + in_) + out**3 + in_**3)
    if experts is not None:
        costs[experts.module] = float(experts.number * experts.count**3 + experts.hidden**3)
    return parallel.owners(costs)


def size_of(weight: Tensor) -> tuple[int, int]:
    """Return (out, in) of a weight."""
    return int(weight.shape[0]), int(weight.shape[1])


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
