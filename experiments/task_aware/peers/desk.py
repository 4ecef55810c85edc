"""What peers share: a model on its calibration tokens, what is known about it, and the form of a result.

Shapes: D hidden, H heads of d dimensions, G key-value heads, I channels of an MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.scoring.block_influence import CosineObserver
from layer_surgery.walk.moments import rows_of
from layer_surgery.walk.observer import Observer
from layer_surgery.walk.walk import Walk


class UnreachableSize(ValueError):
    """A size that a peer cannot reach, or an architecture that it is not defined for."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A smaller model, and what is stored of it."""

    checkpoint: Checkpoint  #: To evaluate.
    parameters: int  #: What the method stores: less than `checkpoint` has where that is padded.
    kept: list[dict[str, Any]]  #: By layer of the original.
    padded: bool = False
    """Whether the evaluated form has the original's shapes, with zeros (or projections) for what was cut: it computes
    the same, but its speed and bytes are not those of the method."""
    predicted: float | None = None  #: Rise of the loss that the method predicts, nats per token.
    expected: dict[str, Any] | None = None  #: The same after a refit, with its interval.
    bytes: int | None = None  #: If not two for each parameter.


@dataclass(kw_only=True)
class Desk:
    """A model on its calibration tokens; `known` holds what peers have found out about it, by name."""

    walk: Walk
    new_scratch: Callable[[str], Path]
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.walk.model.checkpoint

    @property
    def depth(self) -> int:
        return self.walk.model.layer_count

    def bound(self, size: float) -> int:
        """Return the most parameters at a size, a fraction of the original's."""
        return int(size * self.checkpoint.parameters + 1e-6)

    def store(self, name: str, *, wide: bool = False) -> FactorStore:
        """Return an empty store for new tensors in the checkpoint's dtype, as ours are, or in float32 or better."""
        dtype = self.checkpoint.dtype
        return FactorStore(self.new_scratch(name), torch.promote_types(dtype, torch.float32) if wide else dtype)

    def result(self, stores: Sequence[FactorStore], removed: Sequence[int] = ()) -> Checkpoint:
        """Return the original without some layers and with new tensors in others."""
        layers = [
            LayerPlan(index=index, action="remove" if index in removed else "keep") for index in range(self.depth)
        ]
        plan = SurgeryPlan(method="peer", target_layers=self.depth - len(removed), layers=layers)
        return result_checkpoint(self.checkpoint, plan, *stores)

    def remember(self, name: str, find: Callable[[], Any]) -> Any:
        """Return what is known under this name, after finding it out the first time."""
        if name not in self.known:
            self.known[name] = find()
        return self.known[name]

    def observed(self) -> tuple[Observed, list[float]]:
        """Return the moments that one forward pass over the original gives, and the block influence of each layer."""

        def find() -> tuple[Observed, list[float]]:
            seen, cosine = Observed(self.parts()), CosineObserver()
            self.walk.forward(range(self.depth), keep=False, observers=[seen, cosine])
            return seen, [1.0 - cosine.means[index] for index in range(self.depth)]

        found: tuple[Observed, list[float]] = self.remember("observed", find)
        return found

    def parts(self) -> Parts:
        """Return the names of the modules that peers work on; raises `UnreachableSize` if the layers are others."""
        return parts_of(self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Names of the modules of a pre-norm layer with a gated MLP, and its sizes."""

    query: str
    key: str
    value: str
    attention_out: str
    gate: str
    up: str
    down: str
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    width: int  # D
    heads: int  # H
    groups: int  # G
    head: int  # d
    channels: int  # I


def parts_of(checkpoint: Checkpoint) -> Parts:
    """Return the parts of Llama's and Qwen2's layers; `UnreachableSize` for others."""
    architecture, layer = checkpoint.architecture, checkpoint.layers[0]
    names = {name for name, _module in layer.named_modules()}
    config = checkpoint.config
    if len(architecture.attention) != 4 or len(architecture.mlp) != 3 or architecture.model_type not in _KNOWN:
        raise UnreachableSize(f"the peer is written for {', '.join(_KNOWN)}, not for {architecture.model_type}")
    query, key, value, out = architecture.attention
    gate, up, down = architecture.mlp
    heads = int(config.num_attention_heads)
    parts = Parts(
        query=query,
        key=key,
        value=value,
        attention_out=out,
        gate=gate,
        up=up,
        down=down,
        width=int(config.hidden_size),
        heads=heads,
        groups=int(config.num_key_value_heads),
        head=layer.get_submodule(query).out_features // heads,
        channels=layer.get_submodule(down).in_features,
    )
    assert {parts.attention, parts.mlp, parts.attention_norm, parts.mlp_norm} <= names
    return parts


_KNOWN = ("llama", "mistral", "qwen2")


class Observed(Observer):
    """Second moments of each layer: of what its MLP's output projection reads, of values; squares of queries, keys."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.channels: dict[int, Tensor] = {}  # mean h h^T [I, I]
        self.values: dict[int, Tensor] = {}  # mean v v^T [G d, G d], bias included
        self.squares: dict[int, dict[str, Tensor]] = {}  # mean q^2 [H d] and k^2 [G d]
        self._valid: Tensor | None = None

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        parts, sums = self.parts, {"count": 0}
        totals: dict[str, Any] = dict.fromkeys(("h", "v", "q", "k"), 0.0)

        def add(name: str, values: Tensor, square: bool) -> None:
            rows = rows_of(values.detach(), self._valid)
            totals[name] = totals[name] + (rows.T @ rows if square else rows.pow(2).sum(0)).double()
            if name == "h":
                sums["count"] += len(rows)

        hooks = [
            layer.get_submodule(parts.down).register_forward_pre_hook(lambda _m, a: add("h", a[0], True)),
            layer.get_submodule(parts.value).register_forward_hook(lambda _m, _a, out: add("v", out, True)),
            layer.get_submodule(parts.query).register_forward_hook(lambda _m, _a, out: add("q", out, False)),
            layer.get_submodule(parts.key).register_forward_hook(lambda _m, _a, out: add("k", out, False)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.channels[index] = totals["h"] / sums["count"]
        self.values[index] = totals["v"] / sums["count"]
        self.squares[index] = {name: totals[name] / sums["count"] for name in ("q", "k")}

    def batch(self, valid: Tensor) -> None:
        self._valid = valid


def largest(fits: Callable[[float], bool], low: float, high: float, steps: int = 50) -> float:
    """Return the largest number in [low, high] that fits, by bisection; `low` must fit."""
    if fits(high):
        return high
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def weights(layer: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Return weight [out, in] and bias [out] (or None) of a linear, float64."""
    linear: Any = layer.get_submodule(name)
    bias = None if linear.bias is None else linear.bias.detach().double()
    return linear.weight.detach().double(), bias


def tensors(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors of a linear by name."""
    return {"weight": weight} | ({} if bias is None else {"bias": bias})
