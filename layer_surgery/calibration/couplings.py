"""Joint costs of operating on layers: to second order, with how their errors meet at the same tokens.

If operating on layer i changes the stream after it by `delta_i`, and g_i is the gradient of the summed loss there, the
loss of a token changes by about `d_i = g_i . delta_i`; for a set S of layers by their sum. The expected rise of the
loss is then about `1/2 sum_{i,j in S} K_ij`, with `K_ij = E[d_i d_j]` the Fisher information in the directions of these
changes (gradients squared for second derivatives: Martens, https://arxiv.org/abs/1412.1193). Layers next to each other
tend to err on the same tokens, so that K_ij is positive and they cost more together than one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.walk import Walk

#: Fractions of a layer's parameters kept at which costs are measured; 0 is the layer removed.
LEVELS = (0.0, 0.1, 0.3)
#: Fraction of an attention, an MLP or experts kept at which it is measured how errors of such parts meet.
PART_LEVEL = 0.5
#: Measured on one sequence in four, if there are at least this many.
_MANY_SEQUENCES = 32


@dataclass(frozen=True)
class Couplings:
    """The matrices K, in nats per token that carries loss, one for each of `LEVELS`."""

    layers: list[int] = field(default_factory=list)
    matrices: list[list[list[float]]] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)  #: Attentions, MLPs and experts, as "3 mlp".
    part_matrix: list[list[float]] = field(default_factory=list)  #: K of these, at `PART_LEVEL`.

    def correlations(self, names: Sequence[str]) -> list[list[float]] | None:
        """Return how far the errors of parts meet at the same tokens, -1 to 1, for each pair of these parts.

        None if one of them was not measured. A part whose cut changes nothing is correlated with none.
        """
        positions = {name: number for number, name in enumerate(self.parts)}
        if not set(names) <= set(positions):
            return None
        chosen = [positions[name] for name in names]
        norms = {k: self.part_matrix[k][k] ** 0.5 for k in chosen}

        def entry(i: int, j: int) -> float:
            both = norms[i] * norms[j]
            return 1.0 if i == j else self.part_matrix[i][j] / both if both else 0.0

        return [[entry(i, j) for j in chosen] for i in chosen]

    def between(self, keep: float) -> dict[tuple[int, int], float]:
        """Return K for a fraction kept, linearly between the levels; at 1 (and above: factors may be larger than what
        they replace) nothing is lost."""
        levels, keep = [*LEVELS, 1.0], min(keep, 1.0)
        above = next((k for k, level in enumerate(levels) if level >= keep), len(levels) - 1)
        below = max(above - 1, 0)
        width = levels[above] - levels[below]
        share = (keep - levels[below]) / width if width else 0.0

        def entry(level: int, i: int, j: int) -> float:
            return self.matrices[level][i][j] if level < len(LEVELS) else 0.0

        return {
            (a, b): (1 - share) * entry(below, i, j) + share * entry(above, i, j)
            for i, a in enumerate(self.layers)
            for j, b in enumerate(self.layers)
        }

    def cost(self, chosen: Sequence[int], keep: float) -> float:
        """Return the predicted rise of the loss if these layers are operated on, in nats per token."""
        coupling = self.between(keep)
        return 0.5 * sum(coupling[i, j] for i in chosen for j in chosen)

    def scaled(self, factors: Sequence[float]) -> Couplings:
        """Return the couplings of errors scaled layer by layer."""
        matrices = [
            [[factors[i] * value * factors[j] for j, value in enumerate(row)] for i, row in enumerate(matrix)]
            for matrix in self.matrices
        ]
        return replace(self, matrices=matrices)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "levels": list(LEVELS)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Couplings:
        """Read what `to_dict` wrote; `ValueError` if it is for other levels or not square."""
        layers, matrices = [int(i) for i in data["layers"]], data["matrices"]
        square = all(len(m) == len(layers) and all(len(row) == len(layers) for row in m) for m in matrices)
        if tuple(data["levels"]) != LEVELS or len(matrices) != len(LEVELS) or not square:
            raise ValueError("the couplings are not what this release writes")
        *found, part_matrix = [
            [[float(value) for value in row] for row in matrix] for matrix in (*matrices, data["part_matrix"])
        ]
        parts = [str(name) for name in data["parts"]]
        if any(len(row) != len(parts) for row in part_matrix) or len(part_matrix) != len(parts):
            raise ValueError("the couplings of parts are not square")
        return cls(layers, found, parts, part_matrix)


class Responses:
    """Collects d_i for every layer and level while a walk goes back through the layers."""

    def __init__(self, walk: Walk, gradient: Boundary) -> None:
        self._walk, self._gradient = walk, gradient
        count = walk.all_tokens.sequences
        self._all_chosen = torch.arange(count) % (4 if count >= _MANY_SEQUENCES else 1) == 0
        self._chosen = self._all_chosen[walk.share.windows]
        self._values: dict[tuple[int, float], Tensor] = {}
        self._parts: dict[tuple[int, str], Tensor] = {}

    def add(self, index: int, level: float, layer: nn.Module | None) -> None:
        """Run a changed layer `index` (None: without it) and compare with the boundary after the original's."""
        self._values[index, level] = self._changes(index, layer)

    def add_part(self, index: int, part: str, layer: nn.Module) -> None:
        """Do the same with a layer of which only the attention, the MLP or the experts are changed."""
        self._parts[index, part] = self._changes(index, layer)

    def of(self, index: int) -> dict[str, Tensor]:
        """Return the changes of one layer and its parts, by names that `put` knows."""
        levels = {f"level {level}": self._values[index, level] for level in LEVELS if (index, level) in self._values}
        return levels | {f"part {part}": found for (i, part), found in self._parts.items() if i == index}

    def put(self, index: int, changes: Mapping[str, Tensor]) -> None:
        """Take what `of` has given in an earlier run."""
        for name, found in changes.items():
            kind, _, rest = name.partition(" ")
            if kind == "level":
                self._values[index, float(rest)] = found
            else:
                self._parts[index, rest] = found

    @torch.no_grad()
    def _changes(self, index: int, layer: nn.Module | None) -> Tensor:
        """Return d of the chosen sequences of all processes, [valid tokens] or, if there is one answer for each,
        [sequences]."""
        walk = self._walk
        changes = torch.zeros(walk.tokens.valid.shape, dtype=torch.float64)
        for rows in walk.batches():
            chosen = self._chosen[rows]
            if not chosen.any():
                continue
            before = walk.boundary(index).read(rows)[chosen]
            after = before
            if layer is not None:
                after = walk.rehearsal.call(index, walk.tokens.inputs(rows, chosen))(layer, before)
            delta = after.double() - walk.boundary(index + 1).read(rows)[chosen].double()
            changes[rows][chosen] = (delta * self._gradient.read(rows)[chosen].double()).sum(dim=-1).cpu()
        counted, every = walk.all_tokens.valid & self._all_chosen[:, None], walk.rows_of_all(changes)
        if walk.tokens.objective.of_sequences:  # tokens of one sequence move one loss if there is one answer for all
            return (every * counted).sum(dim=1)[self._all_chosen]
        return every[counted]

    def couplings(self) -> Couplings:
        """Return K for all layers that were added."""
        layers = sorted({index for index, _level in self._values})
        predicted = int(self._walk.all_tokens.loss_mask[self._all_chosen].sum())
        matrices = []
        for level in LEVELS:
            changes = torch.stack([self._values[index, level] for index in layers])
            matrices.append((changes @ changes.T / max(1, predicted)).tolist())
        parts, part_matrix = sorted(self._parts), list[list[float]]()
        if parts:
            changes = torch.stack([self._parts[part] for part in parts])
            part_matrix = (changes @ changes.T / max(1, predicted)).tolist()
        return Couplings(layers, matrices, [f"{index} {part}" for index, part in parts], part_matrix)
