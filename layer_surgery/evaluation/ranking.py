"""Retrieval: where the documents of a query stand among all, as nDCG@k.

Jarvelin and Kekalainen, Cumulated gain-based evaluation of IR techniques (TOIS 2002). Documents with equal scores, of
which binary vectors give many, have no order: the value is the mean over all their orders, in closed form (McSherry and
Najork, Computing information retrieval performance measures efficiently in the presence of tied scores, ECIR 2008).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from layer_surgery.evaluation.uncertainty import paired_difference
from layer_surgery.records.embedding import Estimate
from layer_surgery.records.interval import Interval

Array = NDArray[np.float64]


def ndcg(scores: Array, relevant: Sequence[frozenset[int]], k: int = 10) -> Array:
    """Return nDCG@k of each query [Q].

    Args:
        scores: [Q, P], higher is nearer.
        relevant: for each query the indices of its documents, at least one; all are worth the same.
        k: how many documents are looked at.
    """
    discounts = 1 / np.log2(np.arange(2, k + 2))
    # [P + 1]: the discounts of the first so many places.
    gained = np.concatenate([[0.0], np.cumsum(discounts), np.full(max(0, scores.shape[1] - k), discounts.sum())])
    found = np.empty(len(scores))
    for query, (row, wanted) in enumerate(zip(scores, relevant, strict=True)):
        own = row[sorted(wanted)][:, None]
        above, tied = (row > own).sum(axis=1), (row == own).sum(axis=1)
        found[query] = ((gained[above + tied] - gained[above]) / tied).sum() / gained[min(len(wanted), k)]
    return found


def mean_over_queries(values: Array, groups: Sequence[int], seed: int) -> Estimate:
    """Return the mean over queries with an interval over resampled groups of them, such as texts they are from."""
    found = change_over_queries(np.zeros_like(values), values, groups, seed)
    return Estimate(
        value=found.value, low=found.low, high=found.high, confidence=found.confidence, resampled=found.pairs
    )


def change_over_queries(before: Array, after: Array, groups: Sequence[int], seed: int) -> Interval:
    """Return the mean of after - before over the same queries, with a paired interval over groups of them."""
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(places, weights=after - before).astype(np.float64)
    return paired_difference(sums, np.bincount(places).astype(np.float64), seed)
