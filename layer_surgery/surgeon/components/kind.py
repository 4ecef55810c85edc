"""A kind of component: what it offers the search for the attention, the MLP or the experts of a layer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from layer_surgery.calibration.statistics import Statistics
from layer_surgery.calibration.units import UnitOrder, Units
from layer_surgery.checkpoint.bypass import Bypass
from layer_surgery.checkpoint.experts import WIDTH_MULTIPLE, Experts
from layer_surgery.config.choices import COMPONENT_CHOICES
from layer_surgery.registry import Registry
from layer_surgery.surgeon.curves import Alternative, Curve, Floats
from layer_surgery.surgeon.resources import Pricing


@dataclass(frozen=True, kw_only=True)
class PartOfLayer:
    """The attention, the MLP or the experts of one layer: what can be cut, and what is known of it.

    Experts are a part of their own beside the MLP, which then is what all tokens go through: shared experts.
    """

    index: int
    part: Literal["attention", "mlp", "experts"]
    linears: Mapping[str, tuple[int, int]]  #: (out, in) of those that can be replaced.
    output: str  #: The last of them, if it writes to the residual stream, else "".
    units: Units | None  #: Its channels or heads, if they can be cut.
    experts: Experts | None = None  #: For the part of this name.
    bypass: Bypass | None = None  #: An MLP that a linear map can take the place of.
    pricing: Pricing
    multiple: int  #: Ranks and widths are kept to multiples of this.
    statistics: Statistics | None
    """None where only prices are asked for: everything then costs 0 nats."""

    @property
    def name(self) -> str:
        return f"{self.index} {self.part}"

    @property
    def order(self) -> UnitOrder | None:
        """The units in the order in which to keep them."""
        if self.statistics is None:
            return None
        return (self.statistics.channels if self.part == "mlp" else self.statistics.heads).get(self.index)

    def rank_costs(self, name: str) -> Floats:
        """Return the cost [k + 1] of keeping 0, 1, ... k components of a linear, in nats per token with loss."""
        if self.statistics is None:
            return np.zeros(min(self.linears[name]) + 1)
        worth = 0.5 * self.statistics.loss_scale * np.array(self.statistics.values[self.index][name]) ** 2
        return np.append(worth[::-1].cumsum()[::-1], 0.0)

    def whole(self) -> Alternative:
        """Return the alternative in which nothing is cut."""
        if self.experts is not None:
            prices = self.pricing.of_experts(self.experts, self.experts.count)
        else:
            prices = self.pricing.of(self.index, self.part, list(self.linears.values()))
        return Alternative.single("whole", 0.0, {name: float(price) for name, price in prices.items()})

    def unit_curve(self, multiple: int) -> Curve | None:
        """Return the curve of keeping fewer units, in multiples; None if they cannot be cut."""
        if self.units is None:
            return None
        units, order = self.units, self.order
        steps = np.arange(multiple, units.count, multiple)
        if not len(steps) or (self.statistics is not None and order is None):
            return None
        costs = np.zeros(units.count + 1)
        if self.statistics is not None and order is not None:
            costs = np.array(order.costs()) * self.statistics.loss_scale
        share = steps / units.count
        sizes = [
            (out * share if name in units.feeding else out, in_ * share if name == units.output else in_)
            for name, (out, in_) in self.linears.items()
        ]
        weights = sum(out * in_ for out, in_ in (self.linears[name] for name in units.linears))
        biases = (units.count * units.price - weights) * (1 - share)  # those of the rows that go
        return Curve(steps, costs[steps], self.pricing.of(self.index, self.part, sizes, less=biases, share=share))

    def expert_curve(self) -> Curve | None:
        """Return the curve of keeping fewer channels in every expert, in multiples; None if they cannot be cut.

        The multiples are also such as kernels for experts take. The costs of the experts add: that several of them err
        at the same token is not counted.
        """
        if self.experts is None:
            return None
        multiple = math.lcm(self.multiple, WIDTH_MULTIPLE)
        steps, costs = np.arange(multiple, self.experts.count, multiple), np.zeros(self.experts.count + 1)
        orders = None if self.statistics is None else self.statistics.experts.get(self.index)
        if not len(steps) or (self.statistics is not None and orders is None):
            return None
        if self.statistics is not None and orders is not None:
            costs = np.sum([order.costs() for order in orders], axis=0) * self.statistics.loss_scale
        return Curve(steps, costs[steps], self.pricing.of_experts(self.experts, steps))


@dataclass(frozen=True)
class Kind:
    """A kind of component that can be chosen by name."""

    offer: Callable[[PartOfLayer], Alternative | None]
    """Returns what the search may choose for a part of a layer; None where there is nothing of this kind."""
    name: str


KINDS = Registry("component", Kind, COMPONENT_CHOICES)
