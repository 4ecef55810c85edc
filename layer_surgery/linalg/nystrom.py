"""Which input columns of an output projection to keep, in nats: the Nystrom approximation in the metric of the loss.

Knows torch only; computes in float64. Shapes: W [out, in] a weight whose inputs are units that can be cut (the channels
of an MLP, the heads of an attention), A [in, in] the second moment of its inputs, B [out, out] that of the loss
gradient at its outputs. Changing W by D costs `1/2 tr(B D A D^T)` nats per token. If only the columns S stay, the best
weight on them is `W A[:,S] A[S,S]^-1`, and what it costs is the error of a Nystrom approximation of A (Williams &
Seeger, Using the Nystrom method to speed up kernel machines, 2000), measured by W and B:

    cost(S) = 1/2 tr(W^T B W (A - A[:,S] A[S,S]^-1 A[S,:]))

MoDeGPT (https://arxiv.org/abs/2408.09632) cuts MLPs in this way, with columns chosen by leverage scores instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

#: `forward`: from nothing upwards, each time the group that saves most. `backward`: from everything downwards, each
#: time the group that costs least.
Direction = Literal["forward", "backward"]

#: Updates of the large matrices wait until so many columns have been taken: then they are matrix products.
BLOCK = 64
#: Rows and columns that were taken are dropped from the large matrices once at most this fraction of them is left.
_SHRINK = 0.8
#: A column of which less than this fraction of its square is unexplained is a combination of those chosen before it.
_DEPENDENT = 1e-11


@dataclass(frozen=True)
class ColumnOrder:
    """Groups of columns, the one to keep first first, and what each is worth."""

    order: Tensor  # [m] int64, numbers of groups
    gains: Tensor  # [m] float64, nats per token that keeping the group saves after those before it
    total: float  #: Nats per token that keeping none costs.
    rest: float  #: Nats per token that keeping all of `order` costs: 0 unless the choice was stopped early.

    def costs(self) -> Tensor:
        """Return the cost [m + 1] float64 of keeping the first 0, 1, ..., m groups of the order, in nats per token."""
        left = torch.cat([self.gains, self.gains.new_tensor([self.rest])])
        return left.flip(0).cumsum(0).flip(0)


def column_order(
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor | None = None,
    groups: int | Sequence[Tensor] | None = None,
    *,
    direction: Direction = "backward",
    most: int | None = None,
    block: int = BLOCK,
) -> ColumnOrder:
    """Return the order in which to keep groups of input columns of W [out, in], by greedy choice; ties by number.

    Args:
        weight: W [out, in].
        inputs: A [in, in], positive definite (see `low_rank.shrunk`); for single columns and `forward`, semidefinite
            will do.
        outputs: B [out, out]; None is the identity.
        groups: what is kept or dropped together: None for single columns, a size for consecutive groups of it, or the
            column indices [g] int64 of each group; every column is in one group.
        direction: `backward` drops the group that costs least, again and again; `forward` keeps the one that saves
            most. Backward is the better one where much is kept.
        most: with `forward`, stop after so many groups; what the others are worth follows from the total.
        block: columns whose updates are applied together. Changes rounding only.

    Both directions are one recursion on two matrices. Forward, `H = A - A[:,S] A[S,S]^-1 A[S,:]` is what the chosen
    columns S leave unexplained and `G = H W^T B W H`: choosing the group j saves `1/2 tr(H_jj^-1 G_jj)`. Backward, S
    is what is left, `H = A[S,S]^-1` and `G = V^T B V` with V the best weight on S: dropping j costs
    `1/2 tr(H_jj^-1 G_jj)`, the saliency of optimal brain surgeon (Hassibi & Stork, 1993). In both, taking j with
    `H_jj = C C^T` means `H -= L L^T` and `G -= L K^T + K L^T`, where `L = H[:,j] C^-T` and
    `K = G[:,j] C^-T - 1/2 L (C^-1 G_jj C^-T)`.

    About `2 in^3 + 4 in^2 out` floating-point operations for single columns (5e12 for 11,008 to 4,096), nearly all in
    matrix products, with at most six matrices [in, in] of float64 at a time. Raises `ValueError` for groups that do
    not have every column once, for `most` with `backward`, and for an A that is not positive definite where it must be.
    """
    members = _members(groups, weight.shape[1])
    if most is not None and direction == "backward":
        raise ValueError("going backward, the best groups are known last: `most` is for forward")
    columns = torch.cat(members).to(weight.device)
    w, a = weight.double()[:, columns], inputs.double()[columns][:, columns]
    total = _quadratic(w, a, outputs)
    if direction == "forward":
        pair = _Pair(a.clone(), _gram(w @ a, outputs), block)
    else:
        pair = _Pair(torch.cholesky_inverse(_cholesky(a)), _gram(w, outputs), block)
    limit = len(members) if most is None else min(most, len(members))
    sizes = [len(group) for group in members]
    single = all(size == 1 for size in sizes)
    taken = list(_take_columns(pair, limit, direction) if single else _take_groups(pair, sizes, limit, direction))
    if direction == "backward":
        taken.reverse()
    order = torch.tensor([number for number, _gain in taken], dtype=torch.int64)
    gains = torch.tensor([gain for _number, gain in taken], dtype=torch.float64).clamp_min(0.0)
    rest = max(total - float(gains.sum()), 0.0) if limit < len(members) else 0.0
    return ColumnOrder(order, gains, total, rest)


def narrowed(weight: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """Return `W A[:,S] A[S,S]^-1` [out, k] float64: of all weights on the columns S, the best in place of W [out, in].

    `kept` is S [k] int64, in the order wanted; `inputs` is A [in, in]. The best one does not depend on B. With a damped
    A (`low_rank.shrunk`) it is ridge regression towards the columns of W as they are. Raises `ValueError` for an A that
    is not positive definite on S.
    """
    # `W[:,S]` and what the columns that go leave to them: of the inputs, no more than what stands between the two.
    gone = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    gone[kept] = False
    left = weight[:, gone].double() @ inputs[gone][:, kept].double()
    carried = torch.cholesky_solve(left.T, _cholesky(inputs[kept][:, kept].double())).T
    return weight[:, kept].double() + carried


def dropped_cost(weight: Tensor, inputs: Tensor, outputs: Tensor | None, kept: Tensor) -> float:
    """Return what keeping only the columns S of W [out, in] costs with the weight of `narrowed`, in nats per token.

    `kept` is S [k] int64, `inputs` is A [in, in], `outputs` is B [out, out] or None for the identity.
    """
    change, a = weight.double().clone(), inputs.double()
    if len(kept):
        change[:, kept] -= narrowed(weight, a, kept)
    return _quadratic(change, a, outputs)


class _Pair:
    """H and G [n, n] of `column_order` over the columns that are not taken yet; updates wait to be applied together."""

    def __init__(self, h: Tensor, g: Tensor, block: int) -> None:
        self.h, self.g, self._block = h, g, block
        self.columns = torch.arange(len(h), device=h.device)  # [n], which column each row of H and G is
        self.free = torch.ones(len(h), dtype=torch.bool, device=h.device)  # [n]
        self.squares, self.worths = h.diagonal().clone(), g.diagonal().clone()  # [n], of H and G with all updates
        self._left, self._right = h.new_zeros(len(h), block), h.new_zeros(len(h), block)  # L and K that wait
        self._waiting = 0

    def take(self, row: int) -> float:
        """Take the column in this row and return what it is worth, in nats."""
        left, right = self._left[:, : self._waiting], self._right[:, : self._waiting]
        h = self.h[:, row] - left @ left[row]
        g = self.g[:, row] - left @ right[row] - right @ left[row]
        square = h[row]
        worth = g[row] / square
        l_column = h / square.sqrt()
        k_column = g / square.sqrt() - 0.5 * worth * l_column
        self.squares -= l_column**2
        self.worths -= 2 * l_column * k_column
        self._left[:, self._waiting], self._right[:, self._waiting] = l_column, k_column
        self._waiting += 1
        self.free[row] = False
        if self._waiting == self._block:
            self._update(self._left, self._right)
            self._waiting = 0
            if int(self.free.sum()) <= _SHRINK * len(self.free):
                self._shrink()
        return 0.5 * float(worth)

    def take_group(self, rows: Tensor) -> float:
        """Take the columns in these rows [c] together, drop them, and return what they are worth, in nats."""
        h, g = self.h[:, rows], self.g[:, rows]
        corner = _cholesky(h[rows])
        left = torch.linalg.solve_triangular(corner.T, h, upper=True, left=False)
        right = torch.linalg.solve_triangular(corner.T, g, upper=True, left=False)
        inner = torch.linalg.solve_triangular(corner, right[rows], upper=False)  # C^-1 G_jj C^-T
        self._update(left, right - 0.5 * left @ inner)
        self.free[rows] = False
        self._shrink()
        return 0.5 * float(inner.trace())

    def _update(self, left: Tensor, right: Tensor) -> None:
        self.h.addmm_(left, left.T, alpha=-1)
        self.g.addmm_(torch.cat([left, right], dim=1), torch.cat([right, left], dim=1).T, alpha=-1)

    def _shrink(self) -> None:
        """Drop the rows and columns that were taken; no update may wait."""
        rows = self.free.nonzero().flatten()
        self.h, self.g = self.h[rows][:, rows], self.g[rows][:, rows]
        self.squares, self.worths = self.squares[rows], self.worths[rows]
        self.columns, self.free = self.columns[rows], self.free[rows]
        self._left, self._right = self._left[rows], self._right[rows]


def _take_columns(pair: _Pair, limit: int, direction: Direction) -> Iterator[tuple[int, float]]:
    """Yield columns and what they are worth in the order in which they are taken."""
    least = _DEPENDENT * pair.squares
    for count in range(limit):
        if direction == "backward":
            row = int(torch.where(pair.free, pair.worths / pair.squares, torch.inf).argmin())
        else:
            independent = pair.free & (pair.squares > least[pair.columns])
            if not independent.any():
                # What is left is a combination of what was taken, and worth nothing more.
                yield from ((column, 0.0) for column in pair.columns[pair.free].tolist()[: limit - count])
                return
            row = int(torch.where(independent, pair.worths / pair.squares, -torch.inf).argmax())
        yield int(pair.columns[row]), pair.take(row)


def _take_groups(pair: _Pair, sizes: Sequence[int], limit: int, direction: Direction) -> Iterator[tuple[int, float]]:
    """Yield groups of consecutive columns and what they are worth in the order in which they are taken."""
    left = list(range(len(sizes)))
    for _ in range(limit):
        starts = [0, *accumulate(sizes[number] for number in left)]
        device = pair.h.device
        rows = {n: torch.arange(a, b, device=device) for n, (a, b) in zip(left, pairwise(starts), strict=True)}
        worth = {
            number: float(torch.cholesky_solve(pair.g[where][:, where], _cholesky(pair.h[where][:, where])).trace())
            for number, where in rows.items()
        }
        choose = min if direction == "backward" else max
        number = choose(left, key=lambda n: worth[n])
        left.remove(number)
        yield number, pair.take_group(rows[number])


def _members(groups: int | Sequence[Tensor] | None, width: int) -> list[Tensor]:
    """Return the column indices of every group."""
    if groups is None or isinstance(groups, int):
        size = groups or 1
        if width % size:
            raise ValueError(f"{width} columns are not a multiple of {size}")
        return [torch.arange(start, start + size) for start in range(0, width, size)]
    members = [group.cpu() for group in groups]
    if not members or sorted(torch.cat(members).tolist()) != list(range(width)):
        raise ValueError(f"the groups do not have each of {width} columns once")
    return members


def _gram(weight: Tensor, outputs: Tensor | None) -> Tensor:
    """Return `W^T B W` [in, in]."""
    return weight.T @ (weight if outputs is None else outputs.double() @ weight)


def _quadratic(change: Tensor, inputs: Tensor, outputs: Tensor | None) -> float:
    """Return `1/2 tr(B D A D^T)`."""
    sensitive = change if outputs is None else outputs.double() @ change
    return 0.5 * float(((change @ inputs) * sensitive).sum())


def _cholesky(matrix: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ValueError("the second moment of the inputs is not positive definite: damp it")
    result: Tensor = factor
    return result
