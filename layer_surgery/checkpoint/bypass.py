"""Which MLPs a linear map can stand for: whole modules that map the hidden states of a token to as many numbers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from math import prod

from torch import nn

from layer_surgery.checkpoint.architectures import Architecture
from layer_surgery.checkpoint.linears import plain_linears


@dataclass(frozen=True)
class Bypass:
    """The MLP of a layer that a linear map can stand for."""

    module: str  #: Its name within the layer.
    output: str  #: Its output projection.
    hidden: int  #: D.
    parameters: int  #: Of the MLP, biases included.
    biases: int  #: Those of them in biases.

    def price(self, rank: int) -> int:
        """Return the parameters of a map of this rank, with its bias."""
        return (2 * rank + 1) * self.hidden


def bypass_of(layer: nn.Module, architecture: Architecture) -> Bypass | None:
    """Return the MLP of a layer as one that can be bypassed; None if it has none, or a call takes more than one tensor.

    Also None where there is more in the module than its linears, or they are low-rank already.
    """
    linears = plain_linears(layer, architecture.mlp)
    if not linears or architecture.guessed:
        return None
    parents = {name.rpartition(".")[0] for name in linears}
    module = layer.get_submodule(parents.pop())
    first, *_, last = (*linears.values(), *linears.values())
    arguments = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    own = sum(p.numel() for linear in linears.values() for p in linear.parameters())
    hidden = int(first.weight.shape[1])
    if parents or module is layer or len(arguments) != 1 or arguments[0].kind is not arguments[0].POSITIONAL_OR_KEYWORD:
        return None
    if own != sum(p.numel() for p in module.parameters()) or last.weight.shape[0] != hidden:
        return None
    name = next(iter(linears)).rpartition(".")[0]
    weights = sum(prod(linear.weight.shape) for linear in linears.values())
    return Bypass(name, [*linears][-1], hidden, own, own - weights)
