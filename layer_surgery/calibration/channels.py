"""Channels of an MLP: which linears make them, what one costs in parameters, and which to keep first.

A channel is one input of the MLP's output projection, together with the rows of the linears before it that make it: of
gate and up, of one matrix that holds both, or of the first linear of an MLP without a gate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from layer_surgery.checkpoint.architectures import Architecture


@dataclass(frozen=True)
class MlpChannels:
    """The channels of the MLP of one layer."""

    output: str  #: Name of the output projection within the layer.
    feeding: Mapping[str, int]
    """The linears before it, each with the rows that it has for a channel: 2 where gate and up are one matrix."""
    width: int  #: Number of channels.
    price: int  #: Parameters of one channel, biases included.

    def rows(self, kept: Tensor) -> dict[str, Tensor]:
        """Return, for each linear before the output projection, the rows [n] int64 of the channels `kept` [k]."""
        return {
            name: torch.cat([kept + part * self.width for part in range(parts)]) for name, parts in self.feeding.items()
        }


def mlp_channels(layer: nn.Module, architecture: Architecture) -> MlpChannels | None:
    """Return the channels of a layer's MLP; None if it has none that can be cut.

    That is so with experts, with linears that are low-rank already, where the sizes do not say what feeds what, and
    for an architecture that is a guess: between the linears there might be a norm over all channels.
    """
    modules = dict(layer.named_modules())
    names = [name for name in architecture.mlp if name in modules]
    if len(names) < 2 or architecture.guessed:
        return None
    linears = {name: modules[name] for name in names}
    if not all(isinstance(linear, nn.Linear) for linear in linears.values()):
        return None
    output = linears[names[-1]]
    width = int(output.weight.shape[1])
    feeding, price = {}, int(output.weight.shape[0])
    for name in names[:-1]:
        rows, in_ = linears[name].weight.shape
        if rows not in (width, 2 * width) or (rows == 2 * width and len(names) > 2):
            return None
        feeding[name] = rows // width
        price += feeding[name] * (int(in_) + (linears[name].bias is not None))
    return MlpChannels(names[-1], feeding, width, price)


@dataclass(frozen=True)
class ChannelOrder:
    """The channels of one MLP, the one to keep first first."""

    order: list[int]
    gains: list[float]  #: Nats per token that keeping each saves after those before it.

    def costs(self) -> list[float]:
        """Return the cost of keeping the first 0, 1, ... of them, in nats per token."""
        return [*accumulate(reversed(self.gains), initial=0.0)][::-1]

    def kept(self, count: int) -> Tensor:
        """Return the channels [count] int64 to keep, ascending."""
        return torch.tensor(sorted(self.order[:count]), dtype=torch.int64)
