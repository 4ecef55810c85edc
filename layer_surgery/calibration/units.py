"""Units of a layer that can be cut: the channels of its MLP and the heads of its attention.

A unit is some consecutive inputs of an output projection, together with the rows of the linears before it that make
them. A channel is one input of the MLP's output projection with its rows of gate and up (of one matrix that holds both,
or of the first linear of an MLP without a gate). A head is a key/value head with the query heads that read it: rows of
q, k and v, columns of the output projection, and its part of the KV cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from layer_surgery.checkpoint.architectures import Architecture
from layer_surgery.checkpoint.linears import plain_linears


@dataclass(frozen=True)
class Feeding:
    """Rows that a linear has for each unit: `size` consecutive ones in each of `parts` equal parts of the matrix."""

    size: int = 1
    parts: int = 1  #: 2 where gate and up are one matrix.


@dataclass(frozen=True)
class Units:
    """The channels of one MLP, or the heads of one attention."""

    output: str  #: Name of the output projection within the layer.
    feeding: Mapping[str, Feeding]  #: The linears before it.
    count: int
    size: int  #: Inputs of the output projection for each unit.
    price: int  #: Parameters of one unit, biases included.

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears that a cut makes smaller."""
        return (*self.feeding, self.output)

    def columns(self, kept: Tensor) -> Tensor:
        """Return the inputs [n] int64 of the output projection that the units `kept` [k] have."""
        return _spread(kept, self.size)

    def rows(self, kept: Tensor) -> dict[str, Tensor]:
        """Return, for each linear before the output projection, the rows [n] int64 of the units `kept` [k]."""
        return {
            name: torch.cat([_spread(kept + part * self.count, each.size) for part in range(each.parts)])
            for name, each in self.feeding.items()
        }


def _spread(units: Tensor, size: int) -> Tensor:
    return (units[:, None] * size + torch.arange(size)).flatten()


def mlp_channels(layer: nn.Module, architecture: Architecture) -> Units | None:
    """Return the channels of a layer's MLP; None if it has none that can be cut.

    That is so with experts, with linears that are low-rank already, where the sizes do not say what feeds what, and
    for an architecture that is a guess: between the linears there might be a norm over all channels.
    """
    linears = plain_linears(layer, architecture.mlp)
    if linears is None or len(linears) < 2 or architecture.guessed:
        return None
    *before, name_of_output = linears
    out, width = linears[name_of_output].weight.shape
    feeding, price = {}, int(out)
    for name in before:
        rows, in_ = linears[name].weight.shape
        if rows not in (width, 2 * width) or (rows == 2 * width and len(linears) > 2):
            return None
        feeding[name] = Feeding(parts=int(rows // width))
        price += feeding[name].parts * (int(in_) + (linears[name].bias is not None))
    return Units(name_of_output, feeding, int(width), 1, price)


def attention_heads(layer: nn.Module, architecture: Architecture) -> Units | None:
    """Return the heads of a layer's attention, each with its queries; None if they cannot be cut.

    That is so where queries, keys and values are not three linears, where the module knows how many heads it has (the
    names `num_heads` and the like) and not only how wide one is, and where something else in it goes by the head: a
    norm over all queries, sinks, a gate.
    """
    linears = plain_linears(layer, architecture.attention)
    if linears is None or len(linears) != 4 or architecture.guessed:
        return None
    parents = {name.rpartition(".")[0] for name in linears}
    attention = layer.get_submodule(parents.pop())
    width = getattr(attention, "head_dim", None)
    counted = [name for name in ("num_heads", "num_attention_heads", "num_key_value_heads") if hasattr(attention, name)]
    if parents or not isinstance(width, int) or counted or any(True for _ in attention.parameters(recurse=False)):
        return None
    q, k, v, o = linears.values()
    (queries, _), (keys, _) = q.weight.shape, k.weight.shape
    others = [p for name, p in attention.named_parameters() if not name.startswith(tuple(_last_parts(linears)))]
    if v.weight.shape[0] != keys or o.weight.shape[1] != queries or keys % width or queries % keys:
        return None
    if any(tuple(p.shape) != (width,) for p in others):  # a norm of single heads is all that there may be
        return None
    count, sizes = keys // width, (queries * width // keys, width, width)
    feeding = {name: Feeding(size) for name, size in zip(linears, sizes, strict=False)}
    price = sizes[0] * int(o.weight.shape[0])
    for linear, size in zip((q, k, v), sizes, strict=True):
        price += size * (int(linear.weight.shape[1]) + (linear.bias is not None))
    return Units([*linears][-1], feeding, int(count), int(sizes[0]), price)


def _last_parts(names: Mapping[str, nn.Module]) -> list[str]:
    return [f"{name.rpartition('.')[2]}." for name in names]


@dataclass(frozen=True)
class UnitOrder:
    """The channels or heads of one layer, the one to keep first first."""

    order: list[int]
    gains: list[float]  #: Nats per token that keeping each saves after those before it.

    def costs(self) -> list[float]:
        """Return the cost of keeping the first 0, 1, ... of them, in nats per token."""
        return [*accumulate(reversed(self.gains), initial=0.0)][::-1]

    def kept(self, count: int) -> Tensor:
        """Return the units [count] int64 to keep, ascending."""
        return torch.tensor(sorted(self.order[:count]), dtype=torch.int64)
