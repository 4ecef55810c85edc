"""Which input columns of a wide output projection to keep: the choice of `nystrom.column_order`, in matrix products.

Knows torch only. Backward elimination of single columns needs `H = A[S,S]^-1` and the worths `|y_j|^2 / H_jj`, with
`Y = L_B^T V` and V the best weight on what is left, S. Here a block of columns goes at a time: who goes is decided
among the columns that were worth least when the block began, on the small matrices of these alone, and what follows for
all others is two products of matrices. So G [in, in] of `column_order` is never formed, and no pass over large matrices
is made for a single column. The block ends as soon as its next column is worth more than the least of those outside
was, so the choice is the same as one column at a time would make, unless a worth outside falls in the meantime.
"""

import torch
from torch import Tensor

from layer_surgery.linalg.nystrom import ColumnOrder
from layer_surgery.linalg.symmetric import positive_inverse, transposed_times

#: Columns that go at most in one block, and those among which they are chosen.
_BLOCK, _CANDIDATES = 128, 256
#: Columns that are gone are dropped from the large matrices once at most this fraction of them is left.
_SHRINK = 0.9


def blockwise_column_order(weight: Tensor, inputs: Tensor, outputs: Tensor | None = None) -> ColumnOrder:
    """Return the order in which to keep the input columns of W [out, in]; see `nystrom.column_order`.

    `inputs` is A [in, in], positive definite, `outputs` is B [out, out] or None for the identity. The choice is
    backward, by single columns. H is float64, because it is an inverse; Y is float32.

    About `2 in^3 + 2 in^2 out` floating-point operations for any `out`, all in matrix products, an
    inverse by blocks among them, with at most two matrices [in, in] of float64 at a time beside A. Raises `ValueError`
    for an A that is not positive definite.
    """
    h = positive_inverse(inputs.double())
    if h is None:
        raise ValueError("the second moment of the inputs is not positive definite: damp it")
    if outputs is None:
        y = weight.float().clone()  # it is changed in place
    else:
        y = transposed_times(torch.linalg.cholesky(outputs.double()), weight.float())
    columns = torch.arange(len(h), device=h.device)
    free = torch.ones(len(h), dtype=torch.bool, device=h.device)
    taken: list[Tensor] = []
    gains: list[Tensor] = []
    while free.any():
        rows, worths = _least(h, y, free)
        taken.append(columns[rows])
        gains.append(worths)
        _drop(h, y, rows)
        free[rows] = False
        if int(free.sum()) <= _SHRINK * len(free):
            left = free.nonzero().flatten()
            h, y, columns, free = h[left[:, None], left], y[:, left], columns[left], free[left]
    order, gain = torch.cat(taken).flip(0).cpu(), torch.cat(gains).flip(0).cpu()
    return ColumnOrder(order, gain, float(gain.sum()), 0.0)


def _least(h: Tensor, y: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns [n] int64 to drop next, first to go first, and what each costs [n] float64, in nats.

    Those that `free` [m] bool names are still there.
    """
    there = free.nonzero().flatten()
    worths = (torch.linalg.vector_norm(y, dim=0).double().square() / h.diagonal())[there]
    by_worth = worths.argsort(stable=True)
    candidates = there[by_worth[:_CANDIDATES].sort().values]
    outside = float(worths[by_worth[_CANDIDATES]]) if len(by_worth) > _CANDIDATES else torch.inf
    # The small matrices are on the CPU: choosing is a step a column, which an accelerator is slow at.
    small_y = y[:, candidates].double()
    corner, gram = h[candidates][:, candidates].cpu(), (small_y.T @ small_y).cpu()
    stay = torch.ones(len(candidates), dtype=torch.bool)
    chosen: list[int] = []
    costs: list[float] = []
    for _ in range(min(_BLOCK, len(candidates))):
        worth = torch.where(stay, gram.diagonal() / corner.diagonal(), torch.inf)
        best = int(worth.argmin())
        if chosen and float(worth[best]) > outside:
            break
        chosen.append(best)
        costs.append(0.5 * max(float(worth[best]), 0.0))
        stay[best] = False
        # H -= l l^T, and y_j - y_best h_j / h_best in the place of every y_j, for their products.
        share = corner[best] / corner[best, best]
        crossed = torch.outer(share, gram[best])
        gram += torch.outer(share, share) * gram[best, best] - crossed - crossed.T
        corner -= torch.outer(share, corner[best])
        corner[best, best] = 1.0  # gone; what is divided by stays finite
    picked = torch.tensor(chosen, device=h.device)
    return candidates[picked], torch.tensor(costs, dtype=torch.float64, device=h.device)


def _drop(h: Tensor, y: Tensor, rows: Tensor) -> None:
    """Take the columns in `rows` out of H and Y, in place; what stands at their own places is then of no use."""
    corner = torch.linalg.cholesky(h[rows[:, None], rows])
    across = torch.linalg.solve_triangular(corner, h[rows], upper=False)  # [gone, m]
    carried = torch.linalg.solve_triangular(corner.T, y[:, rows].double(), upper=True, left=False)  # [out, gone]
    y.addmm_(carried.to(y.dtype), across.to(y.dtype), alpha=-1)
    h.addmm_(across.T, across, alpha=-1)
    h.diagonal()[rows] = 1.0  # what is divided by stays finite
