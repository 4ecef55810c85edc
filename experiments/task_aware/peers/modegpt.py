"""MoDeGPT: each layer's parts cut in pairs of matrices, without gradients.

Lin et al., MoDeGPT: Modular Decomposition for Large Language Model Compression (https://arxiv.org/abs/2408.09632).

* MLP (type I, Nystrom): the channels with the largest ridge leverage scores `[C (C + lambda I)^-1]_ii` stay, C the
  second moment of what the output projection reads, which is re-solved on them.
* queries and keys (type II, CR): dimensions of a head by `sqrt(E q_i^2 E k_i^2)`; with rotary positions the two
  dimensions that rotate together are one pair; heads that share a key share the choice (squares summed over them).
* values and attention output (type III, SVD): per key-value head, the rank-r product that is nearest on the data:
  with S the moment of its values and O the output projections of its heads one below the other, `O S^(1/2) = U s V^T`,
  `v' = U_r^T O v`, `O' = U_r`. The bias of the values goes with them, exactly.
* layers: sparsity `L phi softmax(-influence / epsilon)` (entropic allocation by block influence), or one for all.

Choices that the paper leaves open, made on other text than is reported on (see `EPSILON`, `RIDGE`). As in the paper all
statistics are of the original. Differences: the ridge is a multiple of the mean square of a channel (the paper: 1, in
units that depend on the number of tokens); no layer loses more than `MOST`; what is left of the budget after rounding
buys channels. Evaluated in the original's shapes with zeros for what was cut; counted without them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layer_surgery.linalg.low_rank import shrunk
from layer_surgery.linalg.nystrom import narrowed

from .desk import Desk, Made, Parts, UnreachableSize, largest, tensors, weights

#: Temperature of the softmax, as a multiple of the mean block influence; None: one sparsity for all layers.
EPSILON: float | None = 4.0
#: Ridge of the leverage scores, as a multiple of the mean square of a channel.
RIDGE = 0.1
#: No layer loses a larger fraction.
MOST = 0.95


def modegpt(desk: Desk, size: float, epsilon: float | None = EPSILON, ridge: float = RIDGE) -> Made:
    """Cut every layer to a fraction of its channels, query-key pairs and value dimensions."""
    parts, bound, whole = desk.parts(), desk.bound(size), desk.checkpoint.parameters
    seen, influence = desk.observed()
    shares = torch.ones(desk.depth, dtype=torch.float64)
    if epsilon is not None:
        found = torch.tensor(influence, dtype=torch.float64)
        shares = desk.depth * torch.softmax(-found / (epsilon * found.mean()), 0)

    def kept_at(average: float) -> list[tuple[int, int, int]]:
        return [_kept(parts, 1.0 - min(MOST, average * float(share))) for share in shares]

    def parameters(kept: list[tuple[int, int, int]]) -> int:
        return whole - sum(_dropped(desk, parts, *one) for one in kept)

    # `largest` looks for the largest number that fits; the least sparsity that fits is the largest of its negative.
    least = -largest(lambda minus: parameters(kept_at(-minus)) <= bound, -float(desk.depth), 0.0)
    kept = kept_at(least)
    if parameters(kept) > bound:
        raise UnreachableSize(f"MoDeGPT with at most {MOST:.0%} of a layer gone does not reach {size}")
    price = parts.width * 3
    spare = (bound - parameters(kept)) // price
    for index in range(desk.depth):
        more = min(spare, parts.channels - kept[index][0], -(-spare // (desk.depth - index)))
        kept[index] = (kept[index][0] + more, *kept[index][1:])
        spare -= more
    store = desk.store("modegpt")
    for index, (channels, pairs, values) in enumerate(kept):
        with desk.walk.model.layer(index) as layer:
            new = {}
            if channels < parts.channels:
                tokens = int(desk.walk.tokens.valid.sum())
                new |= narrowed_mlp(layer, parts, seen.channels[index], channels, ridge, tokens)
            if pairs < parts.head // 2:
                new |= narrowed_keys(layer, parts, seen.squares[index], pairs)
            if values < parts.head:
                new |= narrowed_values(layer, parts, seen.values[index], values)
            for name, written in new.items():
                store.write_tensors(index, name, written)
    return Made(
        checkpoint=desk.result([store]),
        parameters=parameters(kept),
        kept=[{"channels": c, "query_key_pairs": p, "value_dimensions": v} for c, p, v in kept],
        padded=True,
    )


def _kept(parts: Parts, fraction: float) -> tuple[int, int, int]:
    """Return channels, query-key pairs and value dimensions that a layer keeps."""
    sizes = (parts.channels, parts.head // 2, parts.head)
    channels, pairs, values = (max(1, int(fraction * size + 1e-9)) for size in sizes)
    return channels, pairs, values


def _dropped(desk: Desk, parts: Parts, channels: int, pairs: int, values: int) -> int:
    """Return the parameters that a layer loses, biases included."""
    layer = desk.checkpoint.layers[0]
    biased = {name for name in (parts.query, parts.key, parts.value) if layer.get_submodule(name).bias is not None}
    heads, groups, width = parts.heads, parts.groups, parts.width
    pair = 2 * (heads * (width + (parts.query in biased)) + groups * (width + (parts.key in biased)))
    value = groups * (width + (parts.value in biased)) + heads * width
    return (parts.channels - channels) * 3 * width + (parts.head // 2 - pairs) * pair + (parts.head - values) * value


def narrowed_mlp(
    layer: torch.nn.Module, parts: Parts, moment: Tensor, count: int, ridge: float, tokens: int
) -> dict[str, dict[str, Tensor]]:
    """Return the output projection on this many channels, with zeros for the others."""
    kept = leverage_order(moment, ridge)[:count].sort().values
    inputs = shrunk(moment, tokens)
    down, down_bias = weights(layer, parts.down)
    new = torch.zeros_like(down)
    new[:, kept] = narrowed(down, inputs, kept)
    # Gate and up may stay: channels that the output projection does not read do nothing.
    return {parts.down: tensors(new, down_bias)}


def leverage_order(moment: Tensor, ridge: float) -> Tensor:
    """Return the channels [I] by ridge leverage score, the largest first."""
    damped = moment.clone()
    damped.diagonal().add_(ridge * float(moment.diagonal().mean()))
    scores = torch.linalg.solve(damped, moment).diagonal()
    return scores.argsort(descending=True, stable=True)


def narrowed_keys(
    layer: torch.nn.Module, parts: Parts, squares: dict[str, Tensor], count: int
) -> dict[str, dict[str, Tensor]]:
    """Return queries and keys with this many pairs of dimensions a head, and zeros for the others."""
    half = parts.head // 2
    queries = squares["q"].view(parts.groups, -1, 2, half).sum((1, 2))  # [G, pairs], over heads of a group
    keys = squares["k"].view(parts.groups, 2, half).sum(1)
    order = (queries * keys).argsort(dim=1, descending=True, stable=True)
    stays = torch.zeros(parts.groups, half, dtype=torch.bool).scatter_(1, order[:, :count], True)
    per_head = stays.repeat(1, 2)  # [G, d]: the pair of dimension i is i + d / 2
    masks = {parts.query: per_head.repeat_interleave(parts.heads // parts.groups, 0), parts.key: per_head}
    new = {}
    for name, mask in masks.items():
        weight, bias = weights(layer, name)
        rows = mask.flatten().double()
        new[name] = tensors(weight * rows[:, None], None if bias is None else bias * rows)
    return new


def narrowed_values(layer: torch.nn.Module, parts: Parts, moment: Tensor, count: int) -> dict[str, dict[str, Tensor]]:
    """Return values and output projection of this rank a head, with zeros behind it."""
    value, bias = weights(layer, parts.value)
    out, out_bias = weights(layer, parts.attention_out)
    new_value, new_out = torch.zeros_like(value), torch.zeros_like(out)
    new_bias = None if bias is None else torch.zeros_like(bias)
    shared, d = parts.heads // parts.groups, parts.head
    for group in range(parts.groups):
        rows = slice(group * d, (group + 1) * d)
        columns = [slice(head * d, (head + 1) * d) for head in range(group * shared, (group + 1) * shared)]
        stacked = torch.cat([out[:, column] for column in columns])  # [heads of the group x D, d]
        values, vectors = torch.linalg.eigh(moment[rows, rows])
        root = vectors * values.clamp_min(0).sqrt()
        u, _s, _v = torch.linalg.svd(stacked @ root, full_matrices=False)
        projection = u[:, :count].T @ stacked  # [r, d]
        new_value[rows][:count] = projection @ value[rows]
        if bias is not None and new_bias is not None:
            new_bias[rows][:count] = projection @ bias[rows]
        for part, column in zip(u[:, :count].split(parts.width), columns, strict=True):
            new_out[:, column][:, :count] = part
    return {parts.value: tensors(new_value, new_bias), parts.attention_out: tensors(new_out, out_bias)}
