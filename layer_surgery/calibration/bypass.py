"""A linear map in the place of a whole MLP: the best one of every rank, in the metric of the task loss.

Shapes: D hidden, x [D] what the MLP reads, y [D] what it gives, A and C their centred second moments `E[x x^T]` and
`E[y x^T]`, B [D, D] the second moment of the loss gradient at y. The best affine map is `y ~ M x + b` with
`M = C A^-1`; a change of y by d costs `1/2 E[d^T B d]` nats per token, so rank r keeps the leading r components of M in
the metric of A and B (reduced-rank regression: Izenman, Reduced-rank regression for the multivariate linear model,
1975). Linear maps in the place of parts of layers: Puzzle, https://arxiv.org/abs/2411.19146.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from layer_surgery.calibration.damping import damped
from layer_surgery.linalg.low_rank import Factors, whitened_svd
from layer_surgery.walk.moments import MapSums


@dataclass(frozen=True)
class MapWorth:
    """What the components of a linear map are worth."""

    values: list[float]  #: Singular values in the metric, in descending order.
    unexplained: float  #: Nats per token that the best map of full rank leaves.

    def costs(self) -> list[float]:
        """Return the cost of keeping the first 0, 1, ... components, in nats per token."""
        gains = [0.5 * value**2 for value in self.values]
        return [*accumulate(reversed(gains), initial=self.unexplained)][::-1]


@dataclass(frozen=True)
class LinearMap:
    """All components of the best map, the best first, and what its bias is made of."""

    factors: Factors  # [D, D] each
    worth: MapWorth
    mean_input: Tensor  # [D] of x
    mean_output: Tensor  # [D] of y


def best_map(sums: MapSums, gradients: Tensor, index: int, name: str) -> LinearMap:
    """Return the best linear map from sums over tokens; `gradients` is B, damped. In float64."""
    n, mean_in, mean_out = sums.tokens, sums.inputs.double() / sums.tokens, sums.outputs.double() / sums.tokens
    inputs = damped(sums.input_squares.double() / n - torch.outer(mean_in, mean_in), n, index, name)
    outputs = sums.output_squares.double() / n - torch.outer(mean_out, mean_out)
    cross = sums.products.double() / n - torch.outer(mean_out, mean_in)
    matrix = torch.linalg.solve(inputs, cross.T).T
    factors, values = whitened_svd(matrix, inputs, gradients)
    explained = 2 * cross @ matrix.T - matrix @ inputs @ matrix.T
    unexplained = 0.5 * float((gradients * (outputs - explained)).sum())
    return LinearMap(factors, MapWorth(values.tolist(), max(unexplained, 0.0)), mean_in, mean_out)


def bias_of(factors: Sequence[Tensor], mean_input: Tensor, mean_output: Tensor) -> Tensor:
    """Return the bias [D] with which a map of these factors ([D, r] and [r, D]) gives the mean output, float64."""
    left, right = (factor.double() for factor in factors)
    return mean_output.double() - left @ (right @ mean_input.double())
