"""Ridge least squares from sums over tokens, with the ridge chosen on held-out tokens in closed form.

Knows torch only. Shapes: Z inputs [tokens, in], Y targets [tokens, out], W a weight [out, in] with `Y ~ Z W^T`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from layer_surgery.devices import block_rows

#: Ridges that are tried, as multiples of the mean square of an input. Beyond the last, the weight stays as it is. Less
#: than the first gains nothing on text (`reports/task_aware/ridges.json`) and gives inputs that are nearly silent
#: weights which are too large for few bits: fifty times the norm of a projection with 1e-6.
RIDGES: tuple[float, ...] = tuple(10 ** (exponent / 2) for exponent in range(-4, 7))

#: Random directions of the outputs that ridges are compared in, where inputs are too wide for their whole spectrum.
_PROBES = 64
#: Of `RIDGES`, one in so many is tried first there, and then those around the best.
_COARSE = 3


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

    def solve_by_factors(self, weight: Tensor, shared: RidgeProblem | None = None) -> Solution:
        """Return about what `solve` returns, from about a dozen Cholesky factors and no eigendecomposition.

        Ridges are compared in the same `_PROBES` random directions of the outputs, which depend on the sizes only:
        first one in `_COARSE`, then those around the best. The errors of the chosen one and of no change are of all
        outputs. Ridges below the rounding of the sums, with which these are not positive definite, are left out. At
        most three matrices [in, in] of float64 at a time.
        """
        source = shared or self
        w, held_inputs = weight.double(), source.held_out.inputs
        train_inputs, train_products = source.train.inputs.double(), self.train.products.double()
        norm = self.held_out.targets or 1.0

        def error(coordinates: Tensor, products: Tensor) -> float:
            """Return the held-out squared error but for that of giving nothing; float32 where the sums are."""
            quadratic = ((coordinates.to(held_inputs) @ held_inputs).double() * coordinates).sum()
            return float(quadratic - 2 * (coordinates * products).sum())

        held_products = self.held_out.products.double()
        before = self.held_out.targets + error(w, held_products)
        best = self._least_ridge(w, train_inputs, error)
        if best is None:
            return Solution(w, None, before / norm, before / norm)
        remaining = train_products - w @ train_inputs
        best, change = _solve_by_factor(train_inputs, best, remaining.T)
        after = self.held_out.targets + error(w + change.T, held_products)
        if after >= before - 8 * torch.finfo(held_inputs.dtype).eps * norm:
            return Solution(w, None, before / norm, before / norm)
        inputs = train_inputs + held_inputs
        del train_inputs
        remaining = train_products + held_products - w @ inputs
        best, change = _solve_by_factor(inputs, best, remaining.T)
        return Solution(w + change.T, best, before / norm, after / norm)

    def _least_ridge(self, w: Tensor, inputs: Tensor, error: Callable[[Tensor, Tensor], float]) -> float | None:
        """Return the ridge with the least held-out error in random directions of the outputs; None for no change.

        `w` is the weight [out, in] and `inputs` the training sum [in, in], both float64.
        """
        scale = float(inputs.diagonal().mean())
        if scale <= 0:
            return None
        generator = torch.Generator().manual_seed(len(w))
        probes = torch.randn(_PROBES, len(w), generator=generator, dtype=w.dtype).to(w.device)
        start, held_products = probes @ w, probes @ self.held_out.products.double()
        remaining = (probes @ self.train.products.double() - start @ inputs).T

        def try_ridge(number: int) -> None:
            if number not in errors and 0 <= number < len(RIDGES):
                factor = _factor(inputs, RIDGES[number] * scale)
                if factor is not None:
                    errors[number] = error(start + torch.cholesky_solve(remaining, factor).T, held_products)

        errors: dict[int, float] = {len(RIDGES): error(start, held_products)}
        for number in range(0, len(RIDGES), _COARSE):
            try_ridge(number)
        coarse = min(errors, key=lambda number: errors[number])
        for distance in range(1, _COARSE):
            try_ridge(coarse - distance)
            try_ridge(coarse + distance)
        best = min(errors, key=lambda number: errors[number])
        return None if best == len(RIDGES) else RIDGES[best]

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.train.inputs.double())
        return values.clamp_min(0.0), vectors


def _factor(gram: Tensor, ridge: float) -> Tensor | None:
    """Return the Cholesky factor of `gram + ridge I`; None where rounding has made that not positive definite."""
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if failed else factor


def _solve_by_factor(gram: Tensor, ridge: float, right: Tensor) -> tuple[float, Tensor]:
    """Return `(gram + ridge * scale I)^-1 right` with the first ridge of `RIDGES` from this one on that allows it.

    `scale` is the mean of the diagonal. Returns the ridge too.
    """
    scale = float(gram.diagonal().mean())
    for each in (known for known in RIDGES if known >= ridge):
        factor = _factor(gram, each * scale)
        if factor is not None:
            return each, torch.cholesky_solve(right, factor)
    # Larger than any rounding: the sums hold what is not finite, which a solution shows too.
    return ridge, right * torch.nan


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
    if d < block_rows(rows.device):
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
    step = block_rows(left.device)
    for start in range(0, left.shape[1], step):
        total[start : start + step] += left[:, start : start + step].T @ right
