"""Fewer numbers a vector: the linear map after which cosine similarities are nearest to those of the whole vectors.

Knows torch only. Shapes: n texts, D numbers of a vector, d of a mapped one; X [n, D] has rows of length 1, so that
`G = X X^T` are all cosines. Mapped by W [d, D] they are `s_i s_j x_i^T W^T W x_j` with `s_i = 1 / |W x_i|`. Were all s
equal, the best W would be the leading right singular vectors of X (Eckart & Young, 1936), not centred: cosines are of
vectors as they are. They are not, because texts keep different shares of their length. For given s the problem has an
answer too. With `A = diag(s) X = Q R`, `|A M A^T - G|` is least over M of rank d for `R M R^T` the truncation of
`Q^T G Q`: a truncated decomposition in the metric that s gives. So s and W are found in turn, as in alternating least
squares. Rows of W come best first, so each prefix of a mapped vector is a good vector of its size (in the sense of
Kusupati et al., Matryoshka Representation Learning, https://arxiv.org/abs/2205.13147).
"""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import normalize

#: Rounds of s and W; more change the fourth decimal of a correlation.
ROUNDS = 20
#: One text in so many decides between starts and rounds, where there are this many texts for each number; at most so
#: many of them. All give the map itself.
_HELD_OUT, _FEWEST, COMPARED = 4, 2, 1024
#: Directions that hold less of the largest singular value than this are taken for rounding.
_RANK = 1e-6
#: Of the root mean square length: texts of which less is kept would count for more than all others.
_SHORTEST = 0.25


def nested_map(vectors: Tensor, size: int) -> Tensor:
    """Return W [size, D] float64, its rows best first, by the start and the rounds that are best for texts held out.

    Rounds begin with the singular vectors of the vectors as they are, and with those of centred ones, the principal
    components. No round at all may be best: what rounds make small is not the correlation, but nearest to it.

    Args:
        vectors: [n, D] of texts like those that it is for, of any length. More texts than numbers are needed for a
            map that holds for others.
        size: d, of at most the vectors' rank. With it, the cosines of all prefixes of a half or a quarter are good
            too; they are best at d itself.

    Mapped vectors have the mean squared length 1. The signs of rows are set by their largest number. Deterministic.
    Raises `ValueError` if a vector is zero or not finite, or the vectors have too small a rank.
    """
    x = vectors.double()
    lengths = x.norm(dim=1)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError("a vector is zero or not finite")
    x = x / lengths[:, None]
    singular, directions = _right_singular(x)
    rank = int((singular > _RANK * singular[0]).sum())
    if not 1 <= size <= rank:
        raise ValueError(
            f"{size} numbers are asked for, and {len(x)} vectors span {rank}; allowed: 1 to {rank}, or give more texts"
        )
    basis = directions[:rank]
    inner = x @ basis.T  # [n, rank]: the same cosines
    fitted, compared = _parts(inner)
    trials = [
        (_correlation(compared, mapping), centred, rounds)
        for centred in (False, True)
        for rounds, mapping in enumerate(_maps(fitted, size, centred))
    ]
    _, centred, rounds = max(trials, key=lambda trial: trial[0])
    mapping = next(islice(_maps(inner, size, centred), rounds, None))
    return _in_standard_form(mapping @ basis, x)


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return texts to try maps on, and others to compare them on; the same where there are too few to part."""
    if len(x) < _FEWEST * x.shape[1]:
        return x, x
    held_out = torch.arange(len(x)) % _HELD_OUT == 0
    return x[~held_out], x[held_out][:COMPARED]


def _maps(x: Tensor, size: int, centred: bool) -> Iterator[Tensor]:
    """Yield W [size, D] as it begins, from the singular vectors of X or of centred X, and after each round."""
    mapping = _right_singular(x - x.mean(dim=0) if centred else x)[1][:size]
    yield mapping
    for _ in range(ROUNDS):
        kept = (x @ mapping.T).norm(dim=1)
        mapping = best_in_scales(x, 1 / kept.clamp_min(_SHORTEST * kept.square().mean().sqrt()), size)
        yield mapping


def best_in_scales(x: Tensor, scales: Tensor, size: int) -> Tensor:
    """Return W [size, D] for which `|diag(s) X W^T W X^T diag(s) - X X^T|` is least (Frobenius); rows best first.

    Args:
        x: [n, D] of full column rank.
        scales: s [n], positive.
    """
    a = scales[:, None] * x
    triangle = torch.linalg.cholesky(a.T @ a)  # R^T
    onto = torch.linalg.solve_triangular(triangle, a.T @ x, upper=False)  # Q^T X
    values, vectors = torch.linalg.eigh(onto @ onto.T)
    leading = vectors.flip(1)[:, :size] * values.flip(0)[:size].clamp_min(0).sqrt()
    mapping: Tensor = torch.linalg.solve_triangular(triangle.T, leading, upper=True).T
    return mapping


def _right_singular(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return singular values [k], the largest first, and right singular vectors [k, D] of X [n, D]."""
    _, singular, directions = torch.linalg.svd(x, full_matrices=False)
    return singular, directions


def _correlation(x: Tensor, mapping: Tensor) -> float:
    """Return Pearson's correlation of the cosines of all pairs of different texts, mapped and whole."""
    mapped = normalize(x @ mapping.T, dim=1)
    rows, columns = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    pairs = torch.stack([(each @ each.T)[rows, columns] for each in (x, mapped)])
    return float(torch.corrcoef(pairs)[0, 1].nan_to_num()) if pairs.shape[1] > 1 else 0.0


def _in_standard_form(mapping: Tensor, x: Tensor) -> Tensor:
    """Return a map whose vectors have the mean squared length 1, each row with its largest number positive."""
    largest = mapping.gather(1, mapping.abs().argmax(dim=1, keepdim=True))
    return mapping * largest.sign() / (x @ mapping.T).square().sum(dim=1).mean().sqrt()
