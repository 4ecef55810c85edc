"""Which of two ways a matrix is decomposed in: the exact one, or the one that is bound by matrix products."""

from typing import Literal

#: `exact`: whole eigendecompositions, in float64. `leading`: as many components as can be of use, ridges by Cholesky
#: factors, units by blocks. `auto`: exact, unless a matrix is wide.
Decomposition = Literal["auto", "exact", "leading"]
DECOMPOSITIONS: tuple[Decomposition, ...] = ("auto", "exact", "leading")
#: Matrices with a side of at least this are wide. Below it, what is exact takes less than the passes over the tokens.
WIDE = 4096


def takes_leading(way: Decomposition, *sides: int) -> bool:
    """Return whether a matrix with these sides is decomposed in the way `leading`. It depends on nothing else."""
    return way == "leading" or (way == "auto" and max(sides) >= WIDE)
