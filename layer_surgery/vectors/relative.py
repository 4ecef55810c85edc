"""The relative similarity term: where a teacher finds one pair of texts more alike than another, so shall the student.

    mean of relu(b_q - b_p + margin) over all p, q with a_p > a_q

with a_p, b_p the similarities of pair p to the teacher and to the student (Zhang et al., Jasper and Stella,
https://arxiv.org/abs/2412.19048, section 2.2). For n pairs these are up to n(n - 1)/2 terms: 33 million for 128 texts.
None is formed. Each term that is not zero is linear in b, so the gradient at pair k is a difference of two counts,

    g_k = #{p: a_p > a_k, b_p < b_k + margin} - #{q: a_q < a_k, b_q + margin > b_k},

and the sum itself is `sum b_k g_k + margin * (number of terms that are not zero)`. Both counts are of points in a
quarter of a plane and come from one descent through the bits of the order in a, as in a wavelet tree (Grossi, Gupta &
Vitter, High-order entropy-compressed text indexes, 2003): n log n operations, n numbers, and exact.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def relative_similarity(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Return the mean of relu(b_q - b_p + margin) [] in float64 over all p, q with a_p > a_q; 0 if there are none.

    Args:
        student: [n] similarities b, with graph. The gradient is that of the mean; at a kink it is 0.
        teacher: [n] similarities a of the same pairs; of equal ones neither comes first.
        margin: 0 or more.

    Raises `ValueError` if the sizes differ or a similarity is not finite.
    """
    if student.shape != teacher.shape or student.dim() != 1:
        raise ValueError(f"similarities must be [n] and [n], not {list(student.shape)} and {list(teacher.shape)}")
    b, a = student.double(), teacher.detach().double()
    if not (bool(b.isfinite().all()) and bool(a.isfinite().all())):
        raise ValueError("a similarity is not finite")
    ties = torch.unique(a, return_counts=True)[1]
    terms = (len(a) ** 2 - int((ties**2).sum())) // 2
    if not terms:
        return 0.0 * b.sum()
    counts = active_terms(b.detach(), a, margin)
    gradient = (counts.as_lower - counts.as_higher).double()
    total: Tensor = (b * gradient).sum() + margin * int(counts.as_lower.sum())
    return total / terms


class ActiveTerms(NamedTuple):
    """In how many terms that are not zero each pair stands; the two have the same sum."""

    as_lower: Tensor  # [n] int64: as q, the pair that is less alike to the teacher
    as_higher: Tensor  # [n] int64: as p


def active_terms(student: Tensor, teacher: Tensor, margin: float) -> ActiveTerms:
    """Count, for each of n pairs, the terms with a_p > a_q and b_q + margin > b_p in which it is q, and p.

    Every pair is a point as q, at (a_q, b_q + margin), and another as p, at (a_p, b_p). In the order of a, and at
    equal a the p first, a term is a q before a p; in the order of b, and at equal b the q first, a q behind a p.
    """
    n = len(teacher)
    is_lower = torch.arange(2 * n, device=teacher.device) < n
    # Stable sorts by the second key, then by the first.
    by_teacher = _stable_order(torch.cat([teacher, teacher]), is_lower)
    by_student = _stable_order(torch.cat([student + margin, student]), ~is_lower)
    place = torch.empty_like(by_teacher)
    place[by_teacher] = torch.arange(2 * n, device=teacher.device)
    found = _count(place[by_student], is_lower[by_teacher])
    return ActiveTerms(found[place[:n]], found[place[n:]])


def _stable_order(values: Tensor, last: Tensor) -> Tensor:
    """Return the indices [N] that sort values, and equal ones by whether they are to be last."""
    first = last.to(torch.int64).argsort(stable=True)
    return first[values[first].argsort(stable=True)]


def _count(places: Tensor, is_lower: Tensor) -> Tensor:
    """Return, by place, how many of the other kind form a term with it.

    Args:
        places: [N] int64, the places in the order of the teacher, listed in the order of the student.
        is_lower: [N] bool, by place: whether a q is there, or a p.

    A q at place x and a p at place y > x share all bits above one bit, which x has not and y has. So at each bit, all
    with the same bits above it are a group, and what counts is in the group's two halves: its left half's q that are
    listed behind a p of its right half. The group of a place stands in `places` where its own numbers are.
    """
    size = len(places)
    found = torch.zeros_like(places)
    here = torch.arange(size, device=places.device)
    for bit in reversed(range((size - 1).bit_length())):
        start = (places >> (bit + 1)) << (bit + 1)
        end = (start + (1 << (bit + 1))).clamp_max(size)
        right = (places >> bit & 1).bool()
        lower = is_lower[places]
        lefts, left_q, right_p = (_counted_before(each) for each in (~right, ~right & lower, right & ~lower))
        behind = left_q[end] - left_q[here]
        before = right_p[here] - right_p[start]
        found[places] += torch.where(right & ~lower, behind, torch.where(~right & lower, before, 0))
        in_left = start + lefts[here] - lefts[start]
        in_right = start + (1 << bit) + (here - start) - (lefts[here] - lefts[start])
        moved = torch.empty_like(places)
        moved[torch.where(right, in_right, in_left)] = places
        places = moved
    return found


def _counted_before(chosen: Tensor) -> Tensor:
    """Return how many of [N] bool are chosen before each index, and before the end, [N + 1] int64."""
    counts = chosen.cumsum(dim=0)
    return torch.cat([counts.new_zeros(1), counts])
