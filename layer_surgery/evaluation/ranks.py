"""Ranks of values, as Spearman's correlation takes them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the ranks of all values from 1, equal ones sharing the mean of theirs, in the shape of `values`."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse].reshape(values.shape), dtype=np.float64)
