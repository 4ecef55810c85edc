"""One layer of the original beside the same layer of the result: what goes in and out of their linears.

Shapes: B sequences in a micro-batch, S tokens each, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


@torch.no_grad()
def linear_inputs(layer: nn.Module, names: Sequence[str], call: LayerCall, hidden: Tensor) -> dict[str, Tensor]:
    """Return what each linear is called with [B, S, in]. The layer is run no further than needed."""
    seen: dict[str, Tensor] = {}

    def take(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0]
            if len(seen) == len(names):
                raise _Reached

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(layer.get_submodule(name).register_forward_pre_hook(take(name)).remove)
        with suppress(_Reached):
            call(layer, hidden)
    return seen


@torch.no_grad()
def linear_outputs(layer: nn.Module, names: Sequence[str], call: LayerCall, hidden: Tensor) -> dict[str, Tensor]:
    """Return what each linear gives, without its bias [B, S, out]. The layer is run no further than needed."""
    seen: dict[str, Tensor] = {}
    with _watching_outputs(layer, names, seen, stop=True), suppress(_Reached):
        call(layer, hidden)
    return seen


@torch.no_grad()
def run_watched(
    layer: nn.Module, names: Sequence[str], call: LayerCall, hidden: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the layer's output [B, S, D] and what each linear gives, bias included [B, S, out]."""
    seen: dict[str, Tensor] = {}
    with _watching_outputs(layer, names, seen, stop=False):
        after = call(layer, hidden)
    return after, seen


def residual_scales(
    layer: nn.Module, attention_out: str, mlp_out: str, call: LayerCall, hidden: Tensor
) -> ResidualScales | None:
    """Return how the two output projections reach the stream, or None if not by plain (scaled) addition.

    None is for layers with a norm after the projection (Gemma 2, OLMo 2) and for those with other parts, such as
    experts. Found by running the layer, so it holds for any architecture.
    """
    present = [name for name in (attention_out, mlp_out) if name and _has(layer, name)]
    if len(present) < 2:
        return None
    after, seen = run_watched(layer, present, call, hidden)
    change = (after - hidden).double().flatten()
    if any(seen[name].shape != hidden.shape for name in present):
        return None
    parts = torch.stack([seen[name].double().flatten() for name in present], dim=1)
    gram = parts.T @ parts
    if not torch.isfinite(gram).all() or float(torch.linalg.det(gram)) <= 0:
        return None
    scales = torch.linalg.solve(gram, parts.T @ change)
    size = change.norm().clamp_min(1e-30)
    off = float((parts @ scales - change).norm() / size)
    rounding = torch.finfo(after.dtype).eps * float(after.double().norm() / size)
    tolerance = min(_TOLERANCE + rounding, _LARGEST_TOLERANCE)
    return ResidualScales(float(scales[0]), float(scales[1])) if off < tolerance else None


def bias_of(layer: nn.Module, name: str) -> Tensor | None:
    """Return the bias [out] of a linear, or None."""
    bias: Tensor | None = getattr(layer.get_submodule(name), "bias", None)
    return bias


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 (float64 if it is)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_bias(layer: nn.Module, name: str, output: Tensor) -> Tensor:
    """Return the output of a linear less its bias."""
    bias = bias_of(layer, name)
    return output if bias is None else output - bias


@contextmanager
def _watching_outputs(
    layer: nn.Module, names: Sequence[str], seen: dict[str, Tensor], *, stop: bool
) -> Iterator[Mapping[str, Tensor]]:
    def take(name: str) -> Any:
        def hook(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            # A copy, because some layers (Falcon) go on adding in place.
            seen[name] = without_bias(layer, name, output) if stop else output.clone()
            if stop and len(seen) == len(names):
                raise _Reached

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(layer.get_submodule(name).register_forward_hook(take(name)).remove)
        yield seen


def _has(layer: nn.Module, name: str) -> bool:
    try:
        layer.get_submodule(name)
    except AttributeError:
        return False
    return True
