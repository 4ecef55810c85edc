"""Pairs of layers: where the student stands for the same computation as the teacher."""

from collections.abc import Sequence
from itertools import pairwise


def layer_pairs(surviving: Sequence[int], depth: int) -> list[tuple[int, int]]:
    """Return, for every layer of the student, (its position, the layer of the original) whose outputs correspond.

    The student's layer k is the original's layer `surviving[k]`. What it passes on is what its successor reads, so it
    stands for what came before `surviving[k + 1]` in the original: for the output of the layer before that one, be it
    removed or not. The last layer stands for the original's last. Layers that were narrowed or factored survive; where
    nothing was removed, every layer stands for itself. (Pairing k with k, or with `k * depth / len(surviving)` as for
    students that were not cut out of their teacher, compares states of different computations.)

    Args:
        surviving: indices of the original's layers that are in the student, ascending, as `SurgeryPlan.surviving`.
        depth: number of layers of the original.

    Raises `ValueError` for indices that are not those of layers in ascending order.
    """
    ascending = all(one < other for one, other in pairwise(surviving))
    if not surviving or not ascending or surviving[0] < 0 or surviving[-1] >= depth:
        raise ValueError(f"{list(surviving)} are no layers of {depth} in ascending order")
    following = [*surviving[1:], depth]
    return [(position, successor - 1) for position, successor in enumerate(following)]
