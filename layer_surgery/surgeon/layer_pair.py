"""One layer of the original beside the same layer of the result: what goes in and out of their linears.

Shapes: B sequences in a micro-batch, S tokens each, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.walk.rehearsal import LayerCall

#: How far `out = in + s * attention + t * mlp` may be off, relative to the change, to be taken for true, beside the
#: rounding of a stream that may be much larger than its change; and in any case (with a norm in between it is 0.3).
_TOLERANCE = 0.02
_LARGEST_TOLERANCE = 0.15


class _Reached(Exception):
    """Everything that was wanted has been seen."""


@dataclass(frozen=True)
class ResidualScales:
    """A layer adds `attention * c` and `mlp * d` to the stream, c and d the outputs of its two output projections."""

    attention: float
    mlp: float


@dataclass
class Seen:
    """The tensors that passed some linears of a layer, by linear."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # [B, S, in]
    outputs: dict[str, Tensor] = field(default_factory=dict)  # [B, S, out], bias included


@torch.no_grad()
def watch_linears(
    layer: nn.Module, names: Sequence[str], call: LayerCall, hidden: Tensor, *, until: Literal["inputs", "outputs"]
) -> Seen:
    """Return the inputs, or also the outputs, of some linears. The layer is run no further than needed."""
    seen = Seen()
    with _watching(layer, names, seen, until), suppress(_Reached):
        call(layer, hidden)
    return seen


@torch.no_grad()
def run_watched(layer: nn.Module, names: Sequence[str], call: LayerCall, hidden: Tensor) -> tuple[Tensor, Seen]:
    """Return the layer's output [B, S, D], and what passed some of its linears."""
    seen = Seen()
    with _watching(layer, names, seen, "end"):
        return call(layer, hidden), seen


def residual_scales(
    layer: nn.Module, attention_out: str, mlp_out: str, call: LayerCall, hidden: Tensor
) -> ResidualScales | None:
    """Return how the two output projections reach the stream, or None if not by plain (scaled) addition.

    None is for layers with a norm after the projection (Gemma 2, OLMo 2) and for those with other parts, such as
    experts. Found by running the layer, so it holds for any architecture.
    """
    present = [attention_out, mlp_out]
    if not {name for name, _ in layer.named_modules() if name}.issuperset(present):
        return None
    after, seen = run_watched(layer, present, call, hidden)
    change = (after - hidden).double().flatten()
    if any(seen.outputs[name].shape != hidden.shape for name in present):
        return None
    parts = torch.stack([seen.outputs[name].double().flatten() for name in present], dim=1)
    gram = parts.T @ parts
    if not torch.isfinite(gram).all() or float(torch.linalg.det(gram)) <= 0:
        return None
    scales = torch.linalg.solve(gram, parts.T @ change)
    size = change.norm().clamp_min(1e-30)
    off = float((parts @ scales - change).norm() / size)
    rounding = torch.finfo(after.dtype).eps * float(after.double().norm() / size)
    tolerance = min(_TOLERANCE + rounding, _LARGEST_TOLERANCE)
    return ResidualScales(float(scales[0]), float(scales[1])) if off < tolerance else None


def scales_of_all(own: ResidualScales | None) -> ResidualScales | None:
    """Return what the first process has found in its first micro-batch, which is the first of all."""
    found = parallel.from_first(lambda: None if own is None else [own.attention, own.mlp])
    return None if found is None else ResidualScales(*found)


def without_bias(output: Tensor, layer: nn.Module, name: str) -> Tensor:
    """Return the output [..., out] of a linear of the layer without its bias, if it has one."""
    bias: Tensor | None = getattr(layer.get_submodule(name), "bias", None)
    return output if bias is None else output - bias


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 (float64 if it is)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _watching(layer: nn.Module, names: Sequence[str], seen: Seen, until: str) -> Iterator[None]:
    """Have hooks in that fill `seen`, and raise `_Reached` when it holds all the inputs or outputs that are wanted."""

    def take_input(name: str, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.inputs.setdefault(name, arguments[0])  # the first call is with tokens; DeBERTa's next with positions
        if until == "inputs" and len(seen.inputs) == len(names):
            raise _Reached

    def take_output(name: str, _module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if name not in seen.outputs:
            seen.outputs[name] = output.clone()  # some layers (Falcon) go on adding in place
        if until == "outputs" and len(seen.outputs) == len(names):
            raise _Reached

    with ExitStack() as hooks:
        for name in names:
            linear = layer.get_submodule(name)
            hooks.callback(linear.register_forward_pre_hook(partial(take_input, name)).remove)
            if until != "inputs":
                hooks.callback(linear.register_forward_hook(partial(take_output, name)).remove)
        yield
