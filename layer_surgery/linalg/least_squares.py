"""Ridge least squares from sums over tokens, with the ridge chosen on held-out tokens in closed form.

Knows torch only. Shapes: Z inputs [tokens, in], Y targets [tokens, out], W a weight [out, in] with `Y ~ Z W^T`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Ridges that are tried, as multiples of the mean square of an input. Beyond the last, the weight stays as it is.
RIDGES: tuple[float, ...] = tuple(10 ** (exponent / 2) for exponent in range(-12, 7))

#: Symmetric products of matrices this wide and wider are formed block by block, on a CPU and on an accelerator.
_BLOCK = {"cpu": 512, "cuda": 4096}


@dataclass
class Sums:
    """Sums over tokens, float32 or better; those of disjoint tokens may be added."""

    inputs: Tensor  # sum z z^T [in, in]
    products: Tensor  # sum y z^T [out, in]
    targets: float = 0.0  # sum y^2
    tokens: int = 0

    @classmethod
    def zeros(cls, out: int, in_: int, like: Tensor) -> Sums:
        """Return empty sums on the device of `like`, in float32 (float64 if it is)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return cls(
            torch.zeros(in_, in_, dtype=dtype, device=like.device),
            torch.zeros(out, in_, dtype=dtype, device=like.device),
        )

    def add(self, z: Tensor, y: Tensor, *, inputs: bool = True) -> None:
        """Add tokens: z [tokens, in], y [tokens, out]. `inputs=False` if another adds to the same `inputs`."""
        z, y = z.to(self.inputs.dtype), y.to(self.inputs.dtype)
        if inputs:
            add_gram(self.inputs, z)
        add_product(self.products, y, z)
        self.targets += float(y.pow(2).sum(dtype=torch.float64))
        self.tokens += len(z)


@dataclass(frozen=True)
class Solution:
    """A re-solved weight and what it is worth."""

    weight: Tensor  # [out, in], float64
    ridge: float | None
    """The chosen multiple of the inputs' mean square; None if no change was better than every change."""
    error_before: float
    """Held-out squared error of the weight as it was, as a fraction of the targets' sum of squares."""
    error_after: float  #: The same of the weight that the chosen ridge gives on the other tokens.


@dataclass
class RidgeProblem:
    """`Y ~ Z W^T` with a ridge towards the weight as it is, on training and on held-out tokens."""

    train: Sums
    held_out: Sums

    def solve(self, weight: Tensor, shared: RidgeProblem | None = None) -> Solution:
        """Return `W' = W + R^T Z (Z^T Z + ridge)^-1`, with R the remaining error `Y - Z W^T`.

        The ridge is the one of `RIDGES`, or infinity, whose solution on the training tokens has the least held-out
        error; the solution returned uses all tokens. One eigendecomposition serves all ridges; `shared` is a problem
        with the same inputs that has it already. Solved in float64.
        """
        source = shared or self
        eigenvalues, vectors = source._decomposition
        w = weight.double()
        train_inputs, train_products = source.train.inputs.double(), self.train.products.double()
        scale = float(train_inputs.diagonal().mean())
        remaining = (train_products - w @ train_inputs) @ vectors
        # Everything that the held-out error needs, in the eigenvectors' coordinates.
        start = w @ vectors
        held_inputs = vectors.T @ source.held_out.inputs.double() @ vectors
        held_products = self.held_out.products.double() @ vectors

        def error(coordinates: Tensor) -> float:
            quadratic = ((coordinates @ held_inputs) * coordinates).sum()
            return self.held_out.targets - 2 * float((coordinates * held_products).sum()) + float(quadratic)

        before, norm = error(start), self.held_out.targets or 1.0
        ridges = RIDGES if scale > 0 else ()
        errors = {ridge: error(start + remaining / (eigenvalues + ridge * scale)) for ridge in ridges}
        best = min(errors, key=lambda ridge: errors[ridge], default=None)
        # Less than the sums' own rounding is no gain: a small ridge would blow it up where inputs hardly ever point.
        rounding = 8 * torch.finfo(source.train.inputs.dtype).eps * norm
        if best is None or errors[best] >= before - rounding:
            return Solution(w, None, before / norm, before / norm)
        inputs = train_inputs + source.held_out.inputs.double()
        remaining = train_products + self.held_out.products.double() - w @ inputs
        change = _solve_damped(inputs, best * float(inputs.diagonal().mean()), remaining.T).T
        return Solution(w + change, best, before / norm, errors[best] / norm)

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.train.inputs.double())
        return values.clamp_min(0.0), vectors


def _solve_damped(gram: Tensor, ridge: float, right: Tensor) -> Tensor:
    """Return `(gram + ridge I)^-1 right`, where rounding may have made the least eigenvalues of `gram` negative."""
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        values, vectors = torch.linalg.eigh(gram)
        solution: Tensor = vectors @ ((vectors.T @ right) / (values.clamp_min(0.0) + ridge)[:, None])
    else:
        solution = torch.cholesky_solve(right, factor)
    return solution


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add `rows^T rows` to `total` [d, d], for rows [tokens, d]; where d is large, half of it is computed."""
    d = rows.shape[1]
    if d < _BLOCK.get(rows.device.type, 4096):
        total += rows.T @ rows  # formed by itself, so that its bits do not depend on where it is added: see parallel/
        return
    middle = d // 2
    left, right = rows[:, :middle], rows[:, middle:]
    add_gram(total[:middle, :middle], left)
    add_gram(total[middle:, middle:], right)
    corner = left.T @ right
    total[:middle, middle:] += corner
    total[middle:, :middle] += corner.T


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left^T right` to `total` [out, in], for left [tokens, out] and right [tokens, in], some rows at a time.

    As in `add_gram` every part is formed by itself, and little of it exists beside the sum.
    """
    step = _BLOCK.get(left.device.type, 4096)
    for start in range(0, left.shape[1], step):
        total[start : start + step] += left[:, start : start + step].T @ right
