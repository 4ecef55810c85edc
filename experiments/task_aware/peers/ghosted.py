"""Ghosted Layers: a linear map [D, D] of the residual stream stands in the place of each run of removed layers.

Yun et al., Ghosted Layers: Unconstrained Activation Alignment for Recovering Layer-Pruned LLMs
(https://arxiv.org/abs/2605.15491): the unconstrained least-squares map from the stream before the removed layers to the
stream behind them, in closed form from the calibration data. Layers are those with the lowest block influence.

The map is stored (D^2 parameters a run) and cannot be folded into a stock architecture. Differences: a ridge towards
the identity, chosen on held-out calibration sequences, where the paper's least squares have none that matters with its
many tokens; behind a first run, the stream that a map reads is that of the model with the maps before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layer_surgery.linalg.least_squares import RidgeProblem, Sums

from .desk import Desk, Made, Parts, UnreachableSize
from .extended import BEFORE, extended


def ghosted(desk: Desk, size: float) -> Made:
    """Remove the fewest layers that leave room for the maps."""
    bound, parts = desk.bound(size), desk.parts()
    _seen, influence = desk.observed()
    order = sorted(range(desk.depth), key=lambda index: (influence[index], index))
    for count in range(desk.depth):
        removed = sorted(order[:count])
        if stored_parameters(desk, parts, removed) <= bound:
            return with_maps(desk, parts, removed)
    raise UnreachableSize(f"removing all layers but one does not reach {size}")


def stored_parameters(desk: Desk, parts: Parts, removed: Sequence[int]) -> int:
    """Return the parameters of the model without these layers, with a map for each run of them."""
    gone = sum(desk.checkpoint.layer_parameters(index) for index in removed)
    return desk.checkpoint.parameters - gone + len(_runs(removed)) * parts.width**2


def with_maps(desk: Desk, parts: Parts, removed: Sequence[int]) -> Made:
    """Put maps in the place of these layers."""
    runs = _runs(removed)
    if any(after == desk.depth for _first, after in runs):
        raise UnreachableSize("the last layer is among those removed, and no layer is behind it to put a map before")
    walk, store = desk.walk, desk.store("ghosted", wide=True)
    survivors = [index for index in range(desk.depth) if index not in removed]
    maps: dict[int, list[str]] = {}
    walk.forward(range(desk.depth), keep=True)
    stream = [walk.boundary(0).read(rows).clone() for rows in walk.batches()]
    for index in range(max((after for _first, after in runs), default=0)):
        starting = [after for first, after in runs if first == index]
        if starting:
            wanted = [walk.boundary(starting[0]).read(rows) for rows in walk.batches()]
            weight = _best_map(desk, stream, wanted)
            stream = [batch @ weight.T.to(batch) for batch in stream]
            store.write_tensors(starting[0], BEFORE, {"weight": weight})
            maps[survivors.index(starting[0])] = [BEFORE]
        if index not in removed:
            with torch.no_grad(), walk.model.layer(index) as layer:
                for number, rows in enumerate(walk.batches()):
                    call = walk.rehearsal.call(index, walk.tokens.token_ids[rows])
                    stream[number] = call(layer, stream[number])
    checkpoint = desk.result([store], removed)
    if maps:
        checkpoint = extended(checkpoint, maps, parts)
    return Made(
        checkpoint=checkpoint,
        parameters=stored_parameters(desk, parts, removed),
        kept=[{"removed": index in removed} for index in range(desk.depth)],
    )


def _runs(removed: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first layer of each run of removed ones, and the layer behind it."""
    starts = [index for index in sorted(removed) if index - 1 not in removed]
    return [(start, next(k for k in range(start, start + len(removed) + 1) if k not in removed)) for start in starts]


def _best_map(desk: Desk, stream: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the map [D, D] float64 with `stream W^T ~ wanted`, from every eighth sequence its ridge."""
    width = stream[0].shape[-1]
    problem = RidgeProblem(*(Sums.zeros(width, width, stream[0].double()) for _ in range(2)))
    for before, after, rows in zip(stream, wanted, desk.walk.batches(), strict=True):
        valid = desk.walk.tokens.valid[rows]
        held = (torch.arange(rows.start, rows.stop) % 8 == 7)[:, None]
        for sums, chosen in ((problem.train, valid & ~held), (problem.held_out, valid & held)):
            sums.add(before[chosen], after[chosen])
    return problem.solve(torch.eye(width, dtype=torch.float64)).weight
