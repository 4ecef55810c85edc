"""The routed experts of a layer as transformers keeps them: three-dimensional parameters, one slice for each expert.

Classes of experts that transformers runs with kernels of its own (`use_experts_implementation` in
`transformers/integrations/moe.py`) say how their parameters lie: whether there is a gate, whether gate and up are one
behind the other or take turns, whether matrices are stored the other way round, whether there are biases. So nothing
here knows a family.

Shapes: E experts, I channels in each, D hidden, k channels that stay. The weight of the output projection is
`down_proj` [E, D, I], that before it `gate_up_proj` [E, 2 I, D] (`up_proj` [E, I, D] without a gate), their last two
dimensions the other way round where matrices are transposed. A channel is one input of an expert's output projection
with the rows of gate and up that make it; all experts of a layer have the same number of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery.devices import ROW_MULTIPLE

#: Widths are multiples of this: the kernel that transformers runs experts with by default (`grouped_mm`) wants rows of
#: multiples of 16 bytes, and a result is to run in 16 bits too, whatever it is stored in.
WIDTH_MULTIPLE = ROW_MULTIPLE
#: What a class of experts says of itself.
_LAYOUT = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "num_experts")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The sizes and the layout of one layer's experts."""

    module: str  #: Name of the module within the layer.
    number: int  #: E, how many experts there are.
    chosen: int  #: How many of them a token goes through.
    count: int  #: I, channels of every expert.
    hidden: int  #: D.
    gated: bool
    biased: bool
    transposed: bool
    concatenated: bool  #: Whether all rows of the gate come before those of up; else they take turns.
    router: str = (
        ""  #: Name of the module that chooses; "" where experts cannot go because it is not known how it does.
    )
    router_parameters: int = 0  #: Of each expert.

    @property
    def before(self) -> str:
        """The parameter before the output projection."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def output(self) -> str:
        """The name, within the layer, of the parameter that holds the output projections."""
        return f"{self.module}.down_proj"

    @property
    def parts(self) -> int:
        """Rows that a channel has in the projection before."""
        return 2 if self.gated else 1

    @property
    def price(self) -> int:
        """Parameters of one channel in every expert."""
        return self.number * (self.hidden + self.parts * (self.hidden + self.biased))

    @property
    def price_of_one(self) -> int:
        """Parameters that go with one whole expert, those in the router among them."""
        return self.price // self.number * self.count + (self.hidden if self.biased else 0) + self.router_parameters

    @property
    def channel_dims(self) -> dict[str, tuple[int, int]]:
        """For each parameter that has channels: the dimension they are along, and how many there are of each."""
        dims = {"down_proj": (1 if self.transposed else 2, 1), self.before: (2 if self.transposed else 1, self.parts)}
        return dims | ({f"{self.before}_bias": (1, self.parts)} if self.biased else {})

    def down(self, experts: nn.Module) -> Tensor:
        """Return the output projections [E, D, I]."""
        weight = experts.get_parameter("down_proj").detach()
        return weight.transpose(1, 2) if self.transposed else weight

    def as_stored(self, down: Tensor) -> Tensor:
        """Return output projections [E, D, k] as the module has them."""
        return down.transpose(1, 2) if self.transposed else down

    def positions(self, kept: Tensor) -> Tensor:
        """Return the rows [E, n] int64 of gate and up that the channels `kept` [E, k] of each expert have."""
        if self.gated and not self.concatenated:
            return torch.stack([2 * kept, 2 * kept + 1], dim=-1).flatten(1)
        return torch.cat([kept + part * self.count for part in range(self.parts)], dim=1)

    def only(self, experts: nn.Module, kept: Tensor) -> dict[str, Tensor]:
        """Return the parameters before the output projection with the channels `kept` [E, k] of each expert."""
        found = {}
        for name, (dim, _parts) in self.channel_dims.items():
            if name != "down_proj":
                tensor = experts.get_parameter(name).detach()
                rows = self.positions(kept).to(tensor.device)
                found[name] = torch.stack(
                    [each.index_select(dim - 1, row) for each, row in zip(tensor, rows, strict=True)]
                )
        return found


def experts_of(layer: nn.Module) -> Experts | None:
    """Return the experts of a layer; None if it has none, or in a form that is not known."""
    found = [each for name, module in layer.named_modules() if (each := _layout(name, module)) is not None]
    if len(found) != 1:
        return None
    (experts,) = found
    block = experts.module.rpartition(".")[0]
    routers = [name for name, module in layer.get_submodule(block).named_children() if _is_router(module, experts)]
    if len(routers) != 1:
        return experts
    name = f"{block}.{routers[0]}".lstrip(".")
    parameters = sum(p.numel() for p in layer.get_submodule(name).parameters())
    return replace(experts, router=name, router_parameters=parameters // experts.number)


def _is_router(module: nn.Module, experts: Experts) -> bool:
    """Return whether a module chooses among these experts, one by one, and all its tensors go by the expert."""
    said: Any = module
    tensors = [*module.parameters(), *module.buffers()]
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    alike = (
        getattr(said, "num_experts", None) == experts.number and hasattr(said, "top_k") and sizes == {experts.number}
    )
    return alike and getattr(said, "num_group", 1) in (None, 1)


def of_some(module: nn.Module, kept: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a module, buffers among them, of the experts `kept` [k] only; the first dimension is E."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach()[kept.to(tensor.device)] for name, tensor in named.items()}


def _layout(name: str, module: nn.Module) -> Experts | None:
    parameters: Mapping[str, nn.Parameter] = dict(module.named_parameters(recurse=False))
    if "down_proj" not in parameters or not all(hasattr(module, field) for field in _LAYOUT):
        return None
    said: Any = module
    down = parameters["down_proj"]
    chosen = getattr(getattr(module, "config", None), "num_experts_per_tok", None)
    if said.has_post_expert_norm or down.dim() != 3 or not isinstance(chosen, int):
        return None
    number, first, second = (int(size) for size in down.shape)
    hidden, count = (second, first) if said.is_transposed else (first, second)
    experts = Experts(
        module=name,
        number=number,
        chosen=min(chosen, number),
        count=count,
        hidden=hidden,
        gated=bool(said.has_gate),
        biased=bool(said.has_bias),
        transposed=bool(said.is_transposed),
        concatenated=bool(said.is_concatenated),
    )
    matrix = (hidden, experts.parts * count) if experts.transposed else (experts.parts * count, hidden)
    expected = {"down_proj": tuple(down.shape), experts.before: (number, *matrix)}
    if experts.biased:
        expected |= {f"{experts.before}_bias": (number, experts.parts * count), "down_proj_bias": (number, hidden)}
    return experts if {key: tuple(p.shape) for key, p in parameters.items()} == expected else None
