"""SliceGPT: the residual stream is rotated to its principal components before each attention and each MLP, and sliced.

Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns (https://arxiv.org/abs/2401.15024).

All places keep the same number of dimensions r, as in the paper. What is stored: the linears with r in the place of D,
two shortcut matrices [r, r] a layer, the embedding and (because the first and the last rotation differ) a head of its
own, r columns each, also where the original ties the two; no scales of norms, which go into the linears.

Evaluated in the original's coordinates: the stream that is sliced to `x Q_r` is the stream `x Q_r Q_r^T`, so writing
and shortcuts are multiplied by projections, and what is read stays as it is. Norms see the same, because the paper's
divide by the original width too. Equal to the sliced model but for the rounding of its weights, which is left out.
Differences: principal components are those of the original's stream, normed as the norm does it (the paper's
equation); r is not rounded to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery.walk.moments import rows_of
from layer_surgery.walk.observer import Observer

from .desk import Desk, Made, Parts, UnreachableSize, tensors, weights
from .extended import ATTENTION_SHORTCUT, BEFORE, MLP_SHORTCUT, extended, projection

#: Whether principal components are of the stream as the norms scale it, or of the stream as it is.
NORMED = True


def slicegpt(desk: Desk, size: float, normed: bool = NORMED) -> Made:
    """Slice every place of the stream to as many dimensions as fit."""
    parts, bound = desk.parts(), desk.bound(size)
    rank = max((r for r in range(1, parts.width + 1) if stored_parameters(desk, parts, r) <= bound), default=0)
    if rank == 0:
        raise UnreachableSize(f"SliceGPT does not reach {size}")
    return sliced(desk, parts, rank, normed)


def sliced(desk: Desk, parts: Parts, rank: int, normed: bool = NORMED) -> Made:
    """Slice every place of the stream to `rank` dimensions."""
    places = desk.remember(f"streams {normed}", lambda: _moments(desk, parts, normed))
    projections = [projection(place, rank) for place in places]
    store = desk.store("slicegpt", wide=True)
    maps: dict[int, list[str]] = {}
    for index in range(desk.depth):
        between, after = projections[2 * index + 1], projections[2 * index + 2]
        maps[index] = [ATTENTION_SHORTCUT, MLP_SHORTCUT]
        store.write_tensors(index, ATTENTION_SHORTCUT, {"weight": between})
        store.write_tensors(index, MLP_SHORTCUT, {"weight": after})
        if index == 0:
            maps[index].append(BEFORE)
            store.write_tensors(index, BEFORE, {"weight": projections[0]})
        with desk.walk.model.layer(index) as layer:
            for name, onto in ((parts.attention_out, between), (parts.down, after)):
                weight, bias = weights(layer, name)
                store.write_tensors(index, name, tensors(onto @ weight, None if bias is None else onto @ bias))
    return Made(
        checkpoint=extended(desk.result([store]), maps, parts),
        parameters=stored_parameters(desk, parts, rank),
        kept=[{"stream": rank} for _ in range(desk.depth)],
        padded=True,
    )


def stored_parameters(desk: Desk, parts: Parts, rank: int) -> int:
    """Return what SliceGPT stores at this rank."""
    linears = (parts.query, parts.key, parts.value, parts.attention_out, parts.gate, parts.up, parts.down)
    total = 2 * desk.checkpoint.vocabulary_size * rank
    for layer in desk.checkpoint.layers:
        total += 2 * rank * rank
        for name in linears:
            linear: Any = layer.get_submodule(name)
            inner = linear.out_features if name not in (parts.attention_out, parts.down) else linear.in_features
            total += inner * rank
            if linear.bias is not None:
                total += rank if name in (parts.attention_out, parts.down) else inner
    return total


def _moments(desk: Desk, parts: Parts, normed: bool) -> list[Tensor]:
    """Return the second moment of the stream before each attention, before each MLP, and after the last layer."""
    seen = _Streams(parts, normed)
    desk.walk.forward(range(desk.depth), keep=False, observers=[seen])
    return [*(moment for index in range(desk.depth) for moment in seen.inner[index]), seen.last]


class _Streams(Observer):
    """Second moments of what the norms of each layer read, and of the latest stream behind a layer."""

    def __init__(self, parts: Parts, normed: bool) -> None:
        self.inner: dict[int, list[Tensor]] = {}
        self.last = torch.zeros(parts.width, parts.width, dtype=torch.float64)
        self._parts, self._normed = parts, normed
        self._valid: Tensor | None = None

    def _gram(self, stream: Tensor) -> Tensor:
        rows = rows_of(stream, self._valid)
        rows = rows / rows.norm(dim=1, keepdim=True) if self._normed else rows
        return (rows.T @ rows).double()

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        sums = [torch.zeros_like(self.last), torch.zeros_like(self.last)]
        self.inner[index] = sums
        self.last = torch.zeros_like(self.last)

        def adding(place: int) -> Any:
            def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                sums[place] += self._gram(arguments[0])

            return hook

        norms = (self._parts.attention_norm, self._parts.mlp_norm)
        hooks = [layer.get_submodule(norm).register_forward_pre_hook(adding(k)) for k, norm in enumerate(norms)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def batch(self, valid: Tensor) -> None:
        self._valid = valid

    def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
        self.last += self._gram(after)
