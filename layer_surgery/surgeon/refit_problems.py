"""The least-squares problems of a refit: the linears of a layer that are re-solved together, and their sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.checkpoint.modeling_layer_surgery import OUT_FACTOR, LowRankLinear
from layer_surgery.linalg.decomposition import Decomposition, takes_leading
from layer_surgery.linalg.least_squares import RidgeProblem, Solution, Sums
from layer_surgery.walk.moments import rows_of

#: The parts of the tokens that have sums of their own.
PARTS = ("train", "held_out")


class LinearProblems:
    """The least-squares problems of some linears; those that read the same input share its sums."""

    def __init__(self, layer: nn.Module, names: Sequence[str], way: Decomposition) -> None:
        self._layer, self._names, self._way = layer, names, way
        self._reads: dict[str, str] = {}
        self._sums = parallel.Sums(lambda name: (self.owner_of[name.partition(" ")[0]],))

    @property
    def owner_of(self) -> dict[str, int]:
        """The process that each linear belongs to: one for all that share their inputs, and their decomposition."""
        costs: dict[str, float] = {}
        for name in self._names:
            out, in_ = solved_weight(self._layer, name).shape
            reader = self._reads.get(name, name)
            costs[reader] = costs.get(reader, 10.0 * in_**3) + out * in_ * (out + in_)
        found = parallel.owners(costs)
        return {name: found[self._reads.get(name, name)] for name in self._names}

    def add(self, inputs: dict[str, Tensor], targets: dict[str, Tensor], masks: Sequence[Tensor]) -> None:
        """Add a micro-batch.

        Args:
            inputs: what each linear reads in the result [B, S, in], by linear.
            targets: what it should give [B, S, out].
            masks: which tokens are for training and which are held out, [B, S] bool each.
        """
        readers: dict[int, str] = {}
        for name in self._names:
            linear = self._layer.get_submodule(name)
            z = inputs[name]
            if isinstance(linear, LowRankLinear):
                first, z = True, linear.in_factor(z)
            else:
                reader = readers.setdefault(z.data_ptr(), name)
                first = reader == name
                self._reads[name] = reader
            y = targets[name]
            for part, mask in zip(PARTS, masks, strict=True):
                self._add(f"{name} {part}", rows_of(z, mask), rows_of(y, mask), inputs=first)

    def _add(self, name: str, z: Tensor, y: Tensor, *, inputs: bool) -> None:
        """Add tokens, z [tokens, in] and y [tokens, out]; their inputs only if no other linear adds them."""
        out, in_ = y.shape[-1], z.shape[-1]
        like = torch.empty(0, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
        of_inputs = self._sums.term(f"{name} inputs", (in_, in_), like) if inputs else like
        batch = Sums(of_inputs, self._sums.term(f"{name} products", (out, in_), like))
        batch.add(z, y, inputs=inputs)
        counts = torch.tensor([batch.targets, batch.tokens], dtype=torch.float64)
        self._sums.term(f"{name} counts", (2,), counts).add_(counts)

    def end_round(self, present: int) -> None:
        """Bring what the micro-batches of this round add to the owners."""
        self._sums.close(present)

    def solve(self) -> Iterator[tuple[str, Solution]]:
        """Yield each linear of this process with its solution."""
        problems: dict[str, RidgeProblem] = {}
        for name in parallel.own(self.owner_of):
            reader = self._reads.get(name, name)
            problems[name] = problem = RidgeProblem(*(self._of(name, reader, part) for part in PARTS))
            shared = None if reader == name else problems[reader]
            weight = solved_weight(self._layer, name).detach()
            by_factors = takes_leading(self._way, weight.shape[1])
            yield name, problem.solve_by_factors(weight, shared) if by_factors else problem.solve(weight, shared)

    def _of(self, name: str, reader: str, part: str) -> Sums:
        totals = self._sums.totals
        targets, tokens = totals[f"{name} {part} counts"].tolist()
        return Sums(totals[f"{reader} {part} inputs"], totals[f"{name} {part} products"], targets, int(tokens))


def solved_weight(layer: nn.Module, name: str) -> nn.Parameter:
    """Return the weight of a linear that a refit re-solves: its own, or its left factor [out, r]."""
    linear = layer.get_submodule(name)
    return linear.get_parameter(OUT_FACTOR if isinstance(linear, LowRankLinear) else "weight")
