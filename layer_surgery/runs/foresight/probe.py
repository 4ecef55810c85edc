"""A short probe of this machine: seconds of what the stages of a run do, on the checkpoint's own layers.

A layer of each kind passes some sequences, its linears are decomposed by the functions that the run calls, on random
moments of at most `probe_side` (their time is cubic in the sides), and tokens go to moments and to the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layer_surgery.calibration.statistics import useful_rank
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.devices import now, probe_operations, probe_side
from layer_surgery.linalg.blockwise_nystrom import blockwise_column_order
from layer_surgery.linalg.decomposition import takes_leading
from layer_surgery.linalg.leading import leading_whitened_svd
from layer_surgery.linalg.least_squares import RidgeProblem, Sums, add_gram, add_product
from layer_surgery.linalg.low_rank import shrunk, whitened_svd
from layer_surgery.linalg.nystrom import column_order, narrowed
from layer_surgery.runs.foresight.sizes import LayerSizes, Sizes
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk, WalkSettings


@dataclass
class Rates:
    """Seconds a token of each kind of layer, and of the whole model; decompositions in seconds a layer."""

    forward: dict[int, float] = field(default_factory=dict)  #: By layer, as all that follow.
    backward: dict[int, float] = field(default_factory=dict)  #: Forward again and back.
    moments: dict[int, float] = field(default_factory=dict)
    sums: dict[int, float] = field(default_factory=dict)  #: Those of the refit.
    reading: dict[int, float] = field(default_factory=dict)  #: Seconds to read the layer, once.
    decompositions: dict[int, float] = field(default_factory=dict)
    solutions: dict[int, float] = field(default_factory=dict)
    head: float = 0.0
    head_backward: float = 0.0


def some_of(tokens: PackedTokens, sizes: Sizes, settings: WalkSettings, device: torch.device) -> PackedTokens:
    """Return the sequences that a probe runs: at most a micro-batch, fewer where the layers are large."""
    operations = 2 * max(layer.parameters for layer in sizes.layers) * tokens.sequence_length
    count = int(min(settings.batch_size, tokens.sequences, max(1, probe_operations(device) // operations)))
    return tokens.select(slice(0, count))


def probe(
    model: StreamedModel, tokens: PackedTokens, sizes: Sizes, settings: WalkSettings, *, decompositions: bool = True
) -> Rates:
    """Measure a layer of each kind, on some of the tokens; `decompositions`: also what only surgery does."""
    rates, first_of = Rates(), dict[object, int]()
    for index, layer in enumerate(sizes.layers):
        first_of.setdefault(layer.kind, index)
    with Walk(model, some_of(tokens, sizes, settings, model.device), settings) as walk:
        for index in first_of.values():
            _probe_layer(walk, index, rates)
            if decompositions:
                _probe_surgery(walk, index, sizes, rates)
        _probe_head(walk, rates)
    for index, layer in enumerate(sizes.layers):
        for known in vars(rates).values():
            if isinstance(known, dict) and known:
                known[index] = known[first_of[layer.kind]]
    return rates


def _probe_layer(walk: Walk, index: int, rates: Rates) -> None:
    device, tokens = walk.model.device, walk.tokens
    count, rows = int(tokens.valid.sum()), slice(0, tokens.sequences)
    start = now(device)
    with walk.model.layer(index) as layer:
        rates.reading[index] = now(device) - start
        hidden = walk.rehearsal.embed(tokens.inputs(rows))
        call = walk.rehearsal.call(index, tokens.inputs(rows))
        with torch.no_grad():
            rates.forward[index] = seconds_of(lambda: call(layer, hidden), device) / count

        def back() -> None:
            before = hidden.detach().requires_grad_()
            with torch.enable_grad():
                call(layer, before).backward(hidden)  # type: ignore[no-untyped-call]

        rates.backward[index] = seconds_of(back, device) / count


def _probe_surgery(walk: Walk, index: int, sizes: Sizes, rates: Rates) -> None:
    device, layer_sizes, count = walk.model.device, sizes.layers[index], int(walk.tokens.valid.sum())
    rates.moments[index] = _moments(layer_sizes, count, device) / count
    rates.sums[index] = _products(layer_sizes, count, device) / count
    scale = max(1.0, max((max(size) for size in layer_sizes.linears.values()), default=1) / probe_side(device))
    rates.decompositions[index] = _decompose(layer_sizes, sizes, scale, device) * scale**3
    rates.solutions[index] = _solve(layer_sizes, sizes, scale, device) * scale**3


def _probe_head(walk: Walk, rates: Rates) -> None:
    tokens, device = walk.tokens, walk.model.device
    rows, count = slice(0, tokens.sequences), int(tokens.valid.sum())
    hidden = walk.rehearsal.embed(tokens.inputs(rows))
    with walk.new_store() as store:
        last, gradient = Boundary(store, 0), Boundary(store, 1)
        last.write(rows, hidden)
        rates.head = seconds_of(lambda: walk.losses(last), device) / count
        rates.head_backward = seconds_of(lambda: walk.losses(last, gradient), device) / count


def _moments(layer: LayerSizes, count: int, device: torch.device) -> float:
    """Return the seconds of the second moments of a layer's inputs and gradients of so many tokens."""
    sides = [layer.linears[group[0]][1] for group in layer.groups]
    sides += [out for out, _in in layer.linears.values()]
    return sum(_gram(side, count, device) * sides.count(side) for side in set(sides))


def _gram(side: int, count: int, device: torch.device) -> float:
    part = min(side, 2 * probe_side(device))
    rows, total = torch.randn(count, part, device=device), torch.zeros(part, part, device=device)
    return seconds_of(lambda: add_gram(total, rows), device) * (side / part) ** 2


def _products(layer: LayerSizes, count: int, device: torch.device) -> float:
    """Return the seconds of the sums of the refit of a layer of so many tokens."""
    seconds = sum(_gram(layer.linears[group[0]][1], count, device) for group in layer.groups)
    for size in set(layer.linears.values()):
        out, in_ = (min(side, 2 * probe_side(device)) for side in size)
        y, z = torch.randn(count, out, device=device), torch.randn(count, in_, device=device)
        total = torch.zeros(out, in_, device=device)
        each = seconds_of(lambda: add_product(total, y, z), device) * (size[0] * size[1]) / (out * in_)  # noqa: B023
        seconds += each * [*layer.linears.values()].count(size)
    return seconds


def _decompose(layer: LayerSizes, sizes: Sizes, scale: float, device: torch.device) -> float:
    """Return the seconds of decomposing smaller linears as `calibration/collector.py` does."""
    seconds, of_size = 0.0, dict[tuple[object, ...], float]()
    for name, size in layer.linears.items():
        leading, unit = takes_leading(sizes.decomposition, *size), layer.units.get(name)
        key = (size, unit)
        if key not in of_size:
            out, in_ = (max(8, round(side / scale)) for side in size)
            weight, inputs, outputs = torch.randn(out, in_, device=device), _moment(in_, device), _moment(out, device)
            of_size[key] = seconds_of(
                lambda: _reduce(weight, inputs, outputs, leading, unit),  # noqa: B023
                device,
                times=1,
            )
        seconds += of_size[key]
    if layer.experts is not None:
        side = max(8, round(layer.experts.count / scale))
        weight = torch.randn(max(8, round(layer.experts.hidden / scale)), side, device=device)
        inputs, outputs = _moment(side, device), _moment(len(weight), device)
        seconds += layer.experts.number * seconds_of(
            lambda: blockwise_column_order(weight, inputs, outputs), device, times=1
        )
    return seconds


def _reduce(weight: Tensor, inputs: Tensor, outputs: Tensor, leading: bool, unit: int | None) -> None:
    out, in_ = weight.shape
    if leading:
        leading_whitened_svd(weight, inputs, outputs, useful_rank((out, in_)))
    else:
        whitened_svd(weight, inputs, outputs)
    if unit is not None:
        if unit > 1:
            together = next(size for size in range(min(unit, in_), 0, -1) if in_ % size == 0)
            column_order(weight, inputs, outputs, together)
        else:
            (blockwise_column_order if leading else column_order)(weight, inputs, outputs)
        narrowed(weight, inputs, torch.arange(in_ // 2, device=weight.device))


def _solve(layer: LayerSizes, sizes: Sizes, scale: float, device: torch.device) -> float:
    """Return the seconds of re-solving smaller linears as `surgeon/refit.py` does."""
    seconds = 0.0
    for group in layer.groups:
        shared: RidgeProblem | None = None
        for name in group:
            out, in_ = (max(8, round(side / scale)) for side in layer.linears[name])
            problem = _problem(out, in_, device)
            weight = torch.randn(out, in_, device=device)
            wide = takes_leading(sizes.decomposition, *layer.linears[name])
            solve = problem.solve_by_factors if wide else problem.solve
            seconds += seconds_of(lambda: solve(weight, shared), device, times=1)  # noqa: B023
            shared = shared or problem
    return seconds


def _problem(out: int, in_: int, device: torch.device) -> RidgeProblem:
    parts = []
    for count in (in_ + 8, in_ // 4 + 8):
        z, sums = torch.randn(count, in_, device=device), Sums.zeros(out, in_, torch.zeros(1, device=device))
        sums.add(z, torch.randn(count, out, device=device))
        parts.append(sums)
    return RidgeProblem(*parts)


def _moment(side: int, device: torch.device) -> Tensor:
    rows = torch.randn(2 * side, side, device=device)
    return shrunk((rows.T @ rows / len(rows)).double(), len(rows))


def seconds_of(work: Callable[[], object], device: torch.device, times: int = 2) -> float:
    """Return the seconds of some work, the less of so many times."""
    found = []
    for _ in range(times):
        start = now(device)
        work()
        found.append(now(device) - start)
    return min(found)
