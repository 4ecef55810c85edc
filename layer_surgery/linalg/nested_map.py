"""Fewer numbers a vector: the affine map after which cosine similarities go most with those of the whole vectors.

Knows torch only. Shapes: n texts, D numbers of a vector, d of a mapped one; X [n, D] has rows of length 1, so that
`G = X X^T` are all cosines. Mapped by W [d, D] and c [d] they are the cosines of `y_i = W x_i + c`. The measure is the
correlation of both over all pairs of texts. It is of sums over pairs, and these are of small matrices (`|X^T Y|^2` is
the sum of all products of a cosine of X and one of Y), so that it costs as much as mapping the texts does.

Where to begin: were all `s_i = 1 / |W x_i|` equal and c zero, the W that is nearest to G would be the leading right
singular vectors of X (Eckart & Young, 1936), not centred: cosines are of vectors as they are. They are not equal,
because texts keep different shares of their length. For given s that problem has an answer too. With
`A = diag(s) X = Q R`, `|A M A^T - G|` is least over M of rank d for `R M R^T` the truncation of `Q^T G Q`: a truncated
decomposition in the metric that s gives. So s and W are found in turn, as in alternating least squares.

From there a quasi-Newton method (L-BFGS) raises the correlation itself, over c too: what all texts have in common then
takes none of the d numbers. It does so for d and its halves at once, so that each of these prefixes of a mapped vector
is a good vector of its size (Kusupati et al., Matryoshka Representation Learning, https://arxiv.org/abs/2205.13147).
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

#: Rounds of s and W; more change the fourth decimal of a correlation.
ROUNDS = 20
#: One text in so many decides between starts, rounds and steps, where there are this many texts for each number. All
#: give the map itself.
_HELD_OUT, _FEWEST = 4, 2
#: Directions that hold less of the largest singular value than this are taken for rounding.
_RANK = 1e-6
#: Variance of cosines below which they are all taken for the same.
_VARIANCE = 1e-15
#: Of the root mean square length: texts of which less is kept would count for more than all others.
_SHORTEST = 0.25


#: Steps of L-BFGS after which the map is looked at; more fit the texts too closely.
_STEPS = (10, 20, 40, 80)
#: Of the correlation at half of the numbers, against that at all of them, and so on.
_HALF = 0.5
#: Numbers that a half has at least to count.
_SMALLEST = 8


class NestedMap(NamedTuple):
    """An affine map of vectors of length 1."""

    weight: Tensor  #: W [d, D] float64
    bias: Tensor  #: c [d] float64

    def __call__(self, vectors: Tensor) -> Tensor:
        """Map vectors [n, D] of any length to [n, d]."""
        return normalize(vectors, dim=1) @ self.weight.T + self.bias

    def prefix(self, size: int) -> "NestedMap":
        """Return the map to the first `size` numbers."""
        return NestedMap(self.weight[:size], self.bias[:size])


def nested_map(vectors: Tensor, size: int) -> NestedMap:
    """Return the map to `size` numbers: the start, rounds and steps that are best for texts held out.

    Rounds begin with the singular vectors of the vectors as they are, and with those of centred ones, the principal
    components. No round and no step at all may be best: what rounds make small is not the correlation, and with few
    texts steps fit these alone.

    Args:
        vectors: [n, D] of texts like those that it is for, of any length. More texts than numbers are needed for a
            map that holds for others.
        size: d, of at most the vectors' rank.

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
    sizes = _halves(size)
    starts = [
        (agreement(compared, NestedMap(weight, weight.new_zeros(size)), sizes[:1]), centred, rounds)
        for centred in (False, True)
        for rounds, weight in enumerate(_maps(fitted, size, centred))
    ]
    _, centred, rounds = max(starts, key=lambda start: start[0])

    def begun(texts: Tensor) -> NestedMap:
        weight = next(islice(_maps(texts, size, centred), rounds, None))
        return NestedMap(weight, weight.new_zeros(size))

    trials = [(agreement(compared, each, sizes), -steps) for steps, each in _climbed(fitted, begun(fitted), sizes)]
    steps = -max(trials)[1]
    found = next(each for taken, each in _climbed(inner, begun(inner), sizes) if taken == steps)
    return _in_standard_form(NestedMap(found.weight @ basis, found.bias), x)


def agreement(x: Tensor, mapping: NestedMap, sizes: Sequence[int]) -> float:
    """Return the weighted mean over prefixes of these sizes of the correlation of cosines, mapped and whole.

    That of the first size counts once, and each other half of the one before. `x` is [n, D].
    """
    with torch.no_grad():
        return float(_agreement(x, x @ mapping.weight.T + mapping.bias, sizes))


def _agreement(x: Tensor, mapped: Tensor, sizes: Sequence[int]) -> Tensor:
    shares = [_HALF**number for number in range(len(sizes))]
    found = [share * _correlation(x, mapped[:, :size]) for share, size in zip(shares, sizes, strict=True)]
    return torch.stack(found).sum() / sum(shares)


def _climbed(x: Tensor, start: NestedMap, sizes: Sequence[int]) -> Iterator[tuple[int, NestedMap]]:
    """Yield the map as it begins, after no step, and after each number of `_STEPS` that raise its agreement."""
    yield 0, start
    weight, bias = (each.clone(memory_format=torch.contiguous_format).requires_grad_() for each in start)
    # One state throughout, whose later calls go on where the one before has stopped.
    optimizer = torch.optim.LBFGS([weight, bias], history_size=20, line_search_fn="strong_wolfe")
    taken = 0

    def lost() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = 1 - _agreement(x, x @ weight.T + bias, sizes)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for steps in _STEPS:
        optimizer.param_groups[0].update(max_iter=steps - taken, max_eval=4 * (steps - taken))
        optimizer.step(lost)  # type: ignore[no-untyped-call]
        taken = steps
        yield steps, NestedMap(weight.detach().clone(), bias.detach().clone())


def _halves(size: int) -> list[int]:
    """Return a size, half of it, and so on."""
    sizes = [size]
    while sizes[-1] // 2 >= _SMALLEST:
        sizes.append(sizes[-1] // 2)
    return sizes


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return texts to try maps on, and others to compare them on; the same where there are too few to part."""
    if len(x) < _FEWEST * x.shape[1]:
        return x, x
    held_out = torch.arange(len(x)) % _HELD_OUT == 0
    return x[~held_out], x[held_out]


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


def _correlation(x: Tensor, mapped: Tensor) -> Tensor:
    """Return Pearson's correlation [] of the cosines of all pairs of different texts, of X [n, D] and mapped [n, d].

    0 where one of the two is the same for all pairs.
    """
    y = normalize(mapped, dim=1)
    pairs = len(x) * (len(x) - 1)

    def mean_product(one: Tensor, other: Tensor) -> Tensor:  # of the cosines of `one` with those of `other`
        return ((one.T @ other).square().sum() - len(x)) / pairs

    def mean(one: Tensor) -> Tensor:
        return (one.sum(dim=0).square().sum() - len(x)) / pairs

    if pairs == 0:
        return 0 * y.sum()
    means = mean(x), mean(y)
    variances = [mean_product(one, one) - own.square() for one, own in zip((x, y), means, strict=True)]
    if float(torch.stack(variances).detach().min()) <= _VARIANCE:
        return 0 * y.sum()
    return (mean_product(x, y) - means[0] * means[1]) / (variances[0] * variances[1]).sqrt()


def _in_standard_form(mapping: NestedMap, x: Tensor) -> NestedMap:
    """Return a map whose vectors have the mean squared length 1, each row with its largest number positive."""
    weight, bias = mapping
    signs = weight.gather(1, weight.abs().argmax(dim=1, keepdim=True)).sign()
    length = (x @ weight.T + bias).square().sum(dim=1).mean().sqrt()
    return NestedMap(weight * signs / length, bias * signs[:, 0] / length)
