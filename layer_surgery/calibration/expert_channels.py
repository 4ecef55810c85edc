"""Channels of the experts of a layer: which to keep of each, what that costs, and the experts that have only these.

Every expert has an order of its own, by its own inputs; all of a layer keep the same number, because they are one
tensor. What an expert costs is weighted by how many tokens choose it and how much the loss hears of it, so that those
that are seldom chosen count for little. An expert that few tokens of the calibration data chose has a second moment of
few rows, which is drawn towards a multiple of the identity by so much more (`low_rank.shrunk` with the number of its
own tokens): with none at all, its channels are ranked by its weights and the gradients behind the other experts alone,
cost nothing, and its output projection keeps its columns as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layer_surgery.calibration.damping import damped
from layer_surgery.calibration.units import UnitOrder
from layer_surgery.checkpoint.experts import Experts
from layer_surgery.linalg.blockwise_nystrom import blockwise_column_order
from layer_surgery.linalg.decomposition import Decomposition, takes_leading
from layer_surgery.linalg.nystrom import column_order, narrowed
from layer_surgery.walk.expert_moments import ExpertMoments


def expert_orders(
    experts: Experts, module: nn.Module, moments: ExpertMoments, index: int, way: Decomposition = "auto"
) -> list[UnitOrder]:
    """Return the order of the channels of every expert of layer `index`, the one to keep first first.

    Gains are in nats per token, of all tokens and not of those that chose the expert, so that they add.
    """
    outputs = damped(moments.output_moment(), int(moments.chosen.sum()), index, experts.output)
    orders = []
    for expert, weight in enumerate(experts.down(module)):
        choose = blockwise_column_order if takes_leading(way, *weight.shape) else column_order
        order = choose(weight, _inputs(experts, moments, expert, index), outputs)
        share = moments.weight(expert)
        orders.append(UnitOrder(order.order.tolist(), [share * gain for gain in order.gains.tolist()]))
    return orders


def joint_gains(orders: Sequence[UnitOrder]) -> list[float]:
    """Return what keeping one more channel in every expert saves, in nats per token."""
    return [sum(gains) for gains in zip(*(order.gains for order in orders), strict=True)]


def experts_by_worth(orders: Sequence[UnitOrder]) -> UnitOrder:
    """Return the order in which to keep whole experts, with what each is worth in nats per token.

    An expert is worth what its output costs if nothing comes in its place, so these are bounds: the router sends its
    tokens to others. REAP (https://arxiv.org/abs/2510.13999) goes by the mean weighted norm of that output.
    """
    worth = [order.costs()[0] for order in orders]
    by_worth = sorted(range(len(orders)), key=lambda expert: -worth[expert])
    return UnitOrder(by_worth, [worth[expert] for expert in by_worth])


def kept_channels(orders: Sequence[UnitOrder], count: int) -> Tensor:
    """Return the channels [E, count] int64 that stay in each expert, ascending."""
    return torch.stack([order.kept(count) for order in orders])


def narrowed_outputs(experts: Experts, module: nn.Module, moments: ExpertMoments, kept: Tensor, index: int) -> Tensor:
    """Return the output projections [E, D, k] of layer `index`, re-solved on the channels `kept` [E, k] of each.

    In float32 or better, not in the float64 that they are solved in: they are the largest matrices of the model.
    """
    down = experts.down(module)
    dtype = torch.promote_types(down.dtype, torch.float32)
    return torch.stack(
        [
            narrowed(weight, _inputs(experts, moments, expert, index), kept[expert]).to(dtype)
            for expert, weight in enumerate(down)
        ]
    )


def on_some_channels(experts: Experts, module: nn.Module, moments: ExpertMoments, kept: Tensor, index: int) -> Tensor:
    """Return the same in the full size, as the module stores it: columns of channels that do not stay are 0."""
    down = experts.down(module)
    columns = kept.to(down.device)[:, None, :].expand(-1, experts.hidden, -1)
    small = narrowed_outputs(experts, module, moments, kept, index).to(down)
    return experts.as_stored(torch.zeros_like(down).scatter(2, columns, small))


def _inputs(experts: Experts, moments: ExpertMoments, expert: int, index: int) -> Tensor:
    return damped(moments.input_moment(expert), int(moments.chosen[expert]), index, experts.output)
