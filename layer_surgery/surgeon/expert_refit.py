"""Refit of experts: the output projection of each is re-solved so that the layer reaches the original's stream again.

A token gets `sum_k p_k W_k h_k` from the experts k that it chose, with weights p that sum to c. If r is what the stream
still lacks, every one of these experts is asked for `W_k h_k + r / c`. By convexity the squared error of the sum is at
most c times the mean of theirs, weighted by p, and equal at no change: so least squares in each expert by itself, a
token weighted by p, lowers the error of all together. (Everything jointly would be one problem of E x I inputs.)

Shapes: T tokens, n of them at one expert, E experts, I channels, D hidden.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.checkpoint.experts import Experts
from layer_surgery.linalg.decomposition import Decomposition, takes_leading
from layer_surgery.linalg.least_squares import RidgeProblem, Solution, Sums
from layer_surgery.records import RefitRecord
from layer_surgery.surgeon.refit_problems import PARTS
from layer_surgery.walk.expert_moments import inner_activations
from layer_surgery.walk.rehearsal import LayerCall

#: How far `out = in + s * experts + the rest` may be off, relative to the experts' part, beside rounding.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class ExpertTokens:
    """What reached the experts of a layer in one run of it."""

    hidden: Tensor  # [T, D]
    chosen: Tensor  # [T, K] int64
    weights: Tensor  # [T, K]
    stream: Tensor  # the layer's output [T, D]


@torch.no_grad()
def run_with_experts(layer: nn.Module, experts: Experts, call: LayerCall, hidden: Tensor) -> ExpertTokens:
    """Run a layer on a stream [B, S, D] and return what its experts were called with, and the layer's output."""
    seen: list[tuple[Tensor, ...]] = []

    def take(_module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        seen.append((*arguments, *keywords.values()))

    hook = layer.get_submodule(experts.module).register_forward_pre_hook(take, with_kwargs=True)
    try:
        after = call(layer, hidden)
    finally:
        hook.remove()
    ((tokens, chosen, weights),) = seen
    return ExpertTokens(tokens, chosen, weights, after.flatten(0, 1))


@torch.no_grad()
def expert_scale(layer: nn.Module, experts: Experts, call: LayerCall, hidden: Tensor) -> float | None:
    """Return s of `out = rest + s * experts`, or None if the experts' output is not plainly added to the stream.

    Found by running the layer with and without what its experts give, so it holds for any architecture.
    """
    outputs: list[Tensor] = []
    module = layer.get_submodule(experts.module)
    hook = module.register_forward_hook(lambda _module, _arguments, output: outputs.append(output))
    try:
        after = call(layer, hidden)
    finally:
        hook.remove()
    silent = module.register_forward_hook(lambda _module, _arguments, output: torch.zeros_like(output))
    try:
        without = call(layer, hidden)
    finally:
        silent.remove()
    (output,) = outputs
    added, change = output.double().flatten(), (after - without).double().flatten()
    size = float(added.square().sum())
    if not 0 < size < float("inf"):
        return None
    scale = float(added @ change) / size
    off = float((scale * added - change).norm())
    rounding = torch.finfo(after.dtype).eps * float(after.double().norm())
    return scale if scale and off < _TOLERANCE * abs(scale) * size**0.5 + rounding else None


class ExpertProblems:
    """The least-squares problems of some experts of a layer."""

    def __init__(self, experts: Experts, module: nn.Module, group: Sequence[int], way: Decomposition) -> None:
        self._experts, self._module, self._group, self._way = experts, module, group, way
        self.owner_of = parallel.owners({str(expert): 1.0 for expert in group})  #: The process of each, by its number.
        self._sums = parallel.Sums(lambda name: (self.owner_of[name.partition(" ")[0]],))

    def add(self, tokens: ExpertTokens, lacking: Tensor, masks: Sequence[Tensor]) -> None:
        """Add a micro-batch.

        Args:
            tokens: what the experts were called with.
            lacking: what the experts' output would have to be larger by, [T, D].
            masks: which tokens are for training and which are held out, [T] bool each.
        """
        shared = lacking / tokens.weights.sum(dim=1, keepdim=True).to(lacking.dtype).clamp_min(1e-6)
        for expert in self._group:
            token, place = torch.where(tokens.chosen == expert)
            z = inner_activations(self._experts, self._module, expert, tokens.hidden[token]).to(lacking.dtype)
            y = z @ self._down(expert).to(lacking.dtype).T + shared[token]
            root = tokens.weights[token, place, None].to(lacking.dtype).clamp_min(0).sqrt()
            for part, mask in zip(PARTS, masks, strict=True):
                chosen = mask[token]
                self._add(f"{expert} {part}", (root * z)[chosen], (root * y)[chosen])

    def _add(self, name: str, z: Tensor, y: Tensor) -> None:
        out, in_ = y.shape[-1], z.shape[-1]
        batch = Sums(
            self._sums.term(f"{name} inputs", (in_, in_), z), self._sums.term(f"{name} products", (out, in_), z)
        )
        batch.add(z, y)
        counts = torch.tensor([batch.targets, batch.tokens], dtype=torch.float64)
        self._sums.term(f"{name} counts", (2,), counts).add_(counts)

    def end_round(self, present: int) -> None:
        """Bring what the micro-batches of this round add to the owners."""
        self._sums.close(present)

    def solve(self) -> Iterator[tuple[str, Solution, float]]:
        """Yield each expert of this process with its solution and the sum of squares of its held-out targets."""
        for expert in parallel.own(self.owner_of):
            train, held_out = (self._of(expert, part) for part in PARTS)
            problem, weight = RidgeProblem(train, held_out), self._down(int(expert))
            by_factors = takes_leading(self._way, weight.shape[1])
            solution = problem.solve_by_factors(weight) if by_factors else problem.solve(weight)
            yield expert, solution, held_out.targets

    def _of(self, expert: str, part: str) -> Sums:
        totals = self._sums.totals
        targets, tokens = totals[f"{expert} {part} counts"].tolist()
        return Sums(totals[f"{expert} {part} inputs"], totals[f"{expert} {part} products"], targets, int(tokens))

    def _down(self, expert: int) -> Tensor:
        return self._experts.down(self._module)[expert]


def groups_of(experts: Experts, layer: nn.Module) -> list[list[int]]:
    """Return the experts in groups whose sums are together no larger than the layer in float32; one at least in each.

    Each group costs a pass over the tokens.
    """
    sums = len(PARTS) * experts.count * (experts.count + experts.hidden)
    size = max(1, sum(p.numel() for p in layer.parameters()) // max(1, sums))
    everyone = list(range(experts.number))
    return [everyone[start : start + size] for start in range(0, experts.number, size)]


@torch.no_grad()
def refit_experts(
    layer: nn.Module,
    experts: Experts,
    way: Decomposition,
    dtype: torch.dtype,
    rounds: Callable[[], Iterator[tuple[tuple[ExpertTokens, Tensor, Sequence[Tensor]] | None, int]]],
    index: int,
) -> RefitRecord:
    """Re-solve the output projections of a layer's experts in place; return the record of all of them.

    Args:
        layer: of the result, `index` in the original.
        experts: of the layer.
        way: how decompositions are made.
        dtype: that the weights will be stored in: they are rounded to it.
        rounds: a pass over the tokens; yields what `ExpertProblems.add` takes (None where this process has no
            micro-batch) and how many processes have one. The layer is run as it then is.
    """
    module = layer.get_submodule(experts.module)
    parameter = module.get_parameter("down_proj")
    parameter.data = parameter.data.clone()  # it may be a part of a file
    weights = experts.down(module)  # a view of it
    ridges: list[float] = []
    sums = [0.0, 0.0, 0.0]  # held-out errors before and after, and targets
    for group in groups_of(experts, layer):
        problems = ExpertProblems(experts, module, group, way)
        for batch, present in rounds():
            if batch is not None:
                problems.add(*batch)
            problems.end_round(present)
        solved: dict[str, Any] = {}
        with parallel.together():
            for expert, solution, size in problems.solve():
                solved[expert] = [solution.ridge, solution.error_before * size, solution.error_after * size, size]
                if solution.ridge is not None:
                    weights[int(expert)] = solution.weight.to(dtype).to(weights.dtype)
        for expert, (ridge, *errors) in parallel.by_owner(problems.owner_of, solved).items():
            sums = [total + error for total, error in zip(sums, errors, strict=True)]
            if ridge is not None:
                ridges.append(ridge)
                owner = problems.owner_of[expert]
                own = weights[int(expert)].contiguous() if owner == parallel.group().rank else None
                weights[int(expert)] = parallel.broadcast(own, owner, weights.device)
    before, after, targets = sums
    norm = targets or 1.0
    return RefitRecord(
        layer=index,
        linear=experts.output,
        ridge=statistics.median_low(ridges) if ridges else None,
        error_before=before / norm,
        error_after=after / norm,
    )
