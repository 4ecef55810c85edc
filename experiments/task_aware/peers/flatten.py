"""FlattenGPT: two neighbouring layers become one of twice the width, which is then pruned back to the width of one.

Xu et al., FlattenGPT: Depth Compression for Transformer with Layer Flattening (https://arxiv.org/abs/2602.08858). The
abstract and summaries of the paper were read, not all of it, so details are ours:

* pairs: neighbours whose inputs are most alike (least sum of the block influences of the first), without overlap;
* flattening: the heads of both layers side by side, then the channels of both MLPs; scales of norms go into linears;
* channels: ridge leverage scores and a re-solved output projection (MoDeGPT's, which the paper builds on);
* heads: the key-value groups of the two whose loss hurts the attention's output least, the Nystrom error of the output
  projection, which is re-solved on those that stay; statistics from the model as flattened so far.

At a size between two depths, the fewest pairs are flattened that reach it when they are pruned to the original width,
and what is left of the budget gives them more channels than that. So its models have the original's shapes but for
those MLPs. No size is reached for which more pairs are needed than half of the layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery.linalg.low_rank import shrunk
from layer_surgery.linalg.nystrom import column_order, narrowed
from layer_surgery.surgeon.layer_pair import watch_linears
from layer_surgery.walk.moments import rows_of

from .desk import Desk, Made, Parts, UnreachableSize, tensors, weights
from .modegpt import RIDGE, leverage_order

Weights = dict[str, dict[str, Tensor]]  # by linear (or norm), then by tensor


def flattened(desk: Desk, size: float, ridge: float = RIDGE) -> Made:
    """Flatten as many pairs as are needed, first to last."""
    parts, bound = desk.parts(), desk.bound(size)
    _seen, influence = desk.observed()
    each = desk.checkpoint.layer_parameters(0)
    count = max(0, -(-(desk.checkpoint.parameters - bound) // each))
    if 2 * count > desk.depth:
        raise UnreachableSize(f"{count} pairs of layers would have to be flattened, and there are {desk.depth // 2}")
    spare = bound - (desk.checkpoint.parameters - count * each)
    more = min(parts.channels, spare // (count * 3 * parts.width)) if count else 0
    return flatten_pairs(desk, parts, alike_pairs(influence, count), parts.channels + more, ridge)


def alike_pairs(influence: Sequence[float], count: int) -> list[int]:
    """Return the first layers of `count` pairs without overlap, those with the least sum of block influences."""
    # best[k]: the least sum of k pairs among the layers so far, and which they are.
    before: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    latest = dict(before)
    for index, value in enumerate(influence[:-1]):
        found = dict(latest)
        for number, (total, pairs) in before.items():
            if total + value < found.get(number + 1, (math.inf, []))[0]:
                found[number + 1] = (total + value, [*pairs, index])
        before, latest = latest, found
    return latest[count][1]


def flatten_pairs(desk: Desk, parts: Parts, pairs: Sequence[int], channels: int, ridge: float) -> Made:
    """Flatten these pairs, by their first layers, and prune them to one layer's heads and this many channels."""
    walk, store = desk.walk, desk.store("flattened")
    tokens = int(walk.tokens.valid.sum())
    walk.forward([], keep=True)
    stream = [walk.boundary(0).read(rows).clone() for rows in walk.batches()]
    for index in range(pairs[-1] + 1 if pairs else 0):
        if index - 1 in pairs:
            continue
        with walk.model.layer(index) as first:
            layer: nn.Module = first
            if index in pairs:
                with walk.model.layer(index + 1) as second:
                    both = side_by_side(first, second, parts)
                heads, hidden = _moments(desk, index, with_weights(first, both), parts, stream)
                pruned = prune(both, parts, shrunk(heads, tokens), hidden, channels, ridge, tokens)
                for name, new in pruned.items():
                    store.write_tensors(index, name, new)
                rounded = {n: {k: t.to(store.dtype) for k, t in new.items()} for n, new in pruned.items()}
                layer = with_weights(first, rounded)
            with torch.no_grad():
                for number, rows in enumerate(walk.batches()):
                    call = walk.rehearsal.call(index, walk.tokens.token_ids[rows])
                    stream[number] = call(layer, stream[number])
    gone = [index + 1 for index in pairs]
    removed = sum(desk.checkpoint.layer_parameters(index) for index in gone)
    more = len(pairs) * (channels - parts.channels) * 3 * parts.width
    kept = [{"flattened": i in pairs or i in gone, "channels": channels} if i in pairs else {"flattened": i in gone}
            for i in range(desk.depth)]  # fmt: skip
    return Made(
        checkpoint=desk.result([store], gone), parameters=desk.checkpoint.parameters - removed + more, kept=kept
    )


def side_by_side(first: nn.Module, second: nn.Module, parts: Parts) -> Weights:
    """Return the weights of one layer that does what both do, each of their two parts on one input, float64."""
    both: Weights = {}
    for names, out, norm in (
        ((parts.query, parts.key, parts.value), parts.attention_out, parts.attention_norm),
        ((parts.gate, parts.up), parts.down, parts.mlp_norm),
    ):
        scales = [layer.get_submodule(norm).weight.detach().double() for layer in (first, second)]
        both[norm] = {"weight": torch.ones_like(scales[0])}
        for name in names:
            found = [weights(layer, name) for layer in (first, second)]
            weight = torch.cat([w * scale for (w, _bias), scale in zip(found, scales, strict=True)])
            biases = [bias for _w, bias in found if bias is not None]
            both[name] = tensors(weight, torch.cat(biases) if biases else None)
        found = [weights(layer, out) for layer in (first, second)]
        biases = [bias for _w, bias in found if bias is not None]
        both[out] = tensors(torch.cat([w for w, _bias in found], dim=1), sum(biases[1:], biases[0]) if biases else None)
    return both


def with_weights(layer: nn.Module, new: Weights) -> nn.Module:
    """Return a copy of a layer with other linears and norms, of whatever sizes these have."""
    result = copy.deepcopy(layer)
    for name, found in new.items():
        module: Any = result.get_submodule(name)
        like = module.weight
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = found["weight"].shape
        for own, tensor in found.items():
            setattr(module, own, nn.Parameter(tensor.to(like), requires_grad=False))
    return result


def prune(
    both: Weights, parts: Parts, heads: Tensor, hidden: Tensor, channels: int, ridge: float, tokens: int
) -> Weights:
    """Keep half of the key-value groups and so many channels, and re-solve both output projections on them.

    `heads` and `hidden` are the second moments of what the output projections read; the first can be inverted.
    """
    d, shared = parts.head, parts.heads // parts.groups
    out = both[parts.attention_out]
    order = column_order(out["weight"], heads, groups=shared * d).order
    groups = order[: parts.groups].sort().values
    of_queries, of_keys = _rows(groups, shared * d), _rows(groups, d)
    new = {parts.attention_norm: both[parts.attention_norm], parts.mlp_norm: both[parts.mlp_norm]}
    for name, rows in ((parts.query, of_queries), (parts.key, of_keys), (parts.value, of_keys)):
        new[name] = {own: tensor[rows] for own, tensor in both[name].items()}
    new[parts.attention_out] = {**out, "weight": narrowed(out["weight"], heads, of_queries)}
    kept = leverage_order(hidden, ridge)[:channels].sort().values
    for name in (parts.gate, parts.up):
        new[name] = {own: tensor[kept] for own, tensor in both[name].items()}
    new[parts.down] = {**both[parts.down], "weight": narrowed(both[parts.down]["weight"], shrunk(hidden, tokens), kept)}
    return new


def _rows(groups: Tensor, size: int) -> Tensor:
    return (groups[:, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def _moments(desk: Desk, index: int, layer: nn.Module, parts: Parts, stream: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the second moments of what the two output projections of a layer read, on this stream."""
    sums: dict[str, Any] = {parts.attention_out: 0.0, parts.down: 0.0}
    walk = desk.walk
    for batch, rows in zip(stream, walk.batches(), strict=True):
        call = walk.rehearsal.call(index, walk.tokens.token_ids[rows])
        for name, read in watch_linears(layer, list(sums), call, batch, until="inputs").inputs.items():
            found = rows_of(read, walk.tokens.valid[rows])
            sums[name] = sums[name] + (found.T @ found).double()
    tokens = int(walk.tokens.valid.sum())
    return sums[parts.attention_out] / tokens, sums[parts.down] / tokens
