"""An embedding model beside the one that it was made from: similarities kept, retrieval, sizes, and both used together.

Works on vectors; who made them, and how, is not known here. Shapes: N texts, Q queries, P documents, D numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layer_surgery.data.retrieval import RetrievalSet
from layer_surgery.evaluation.ranking import change_over_queries, mean_over_queries, ndcg
from layer_surgery.evaluation.similarities import agreement
from layer_surgery.records.embedding import STORAGES, AsymmetricUse, EmbeddingQuality, Estimate, VectorQuality
from layer_surgery.vectors.storage import bytes_per_vector, prefix, read_back
from layer_surgery.vectors.unit import unit

Array = NDArray[np.float64]
#: Prefixes are halved down to this many numbers.
FEWEST = 8
#: Decimals of a similarity that count.
DIGITS = 12


@dataclass(frozen=True)
class RetrievalVectors:
    """One model's vectors of a retrieval set, of any length."""

    queries: Tensor  #: [Q, D]
    documents: Tensor  #: [P, D]


@dataclass(frozen=True)
class TextVectors:
    """One model's vectors of all that is measured on, of any length."""

    texts: Tensor  #: [N, D]
    retrieval: Mapping[str, RetrievalVectors]  #: By the name of the set.

    @property
    def dimensions(self) -> int:
        return self.texts.shape[1]

    def stored(self, dimensions: int, storage: str) -> "TextVectors":
        """Return what is left of the vectors at a size and in a way to store them."""

        def kept(vectors: Tensor) -> Tensor:
            return read_back(prefix(vectors, dimensions), storage)

        return TextVectors(
            kept(self.texts),
            {name: RetrievalVectors(kept(own.queries), kept(own.documents)) for name, own in self.retrieval.items()},
        )


def halves(dimensions: int, fewest: int = FEWEST) -> list[int]:
    """Return the sizes that are measured: all numbers, then half of them and so on, as long as `fewest` are left."""
    sizes = [dimensions]
    while sizes[-1] // 2 >= fewest:
        sizes.append(sizes[-1] // 2)
    return sizes


def embedding_quality(
    model: TextVectors, original: TextVectors, sets: Sequence[RetrievalSet], sizes: Sequence[int], seed: int
) -> EmbeddingQuality:
    """Measure a model's vectors beside the original's.

    Args:
        model: vectors of the model.
        original: those of the same texts, queries and documents by the original.
        sets: what the queries and documents are.
        sizes: numbers of a vector to measure at, each at most the model's; see `halves`.
        seed: of the resampling: the same for all, so that intervals can be compared.

    Raises `DataError` if there are too few different texts, and `ValueError` for a vector without direction.
    """
    theirs = _cosines(original.texts, original.texts)
    before = {each.name: _ndcg(original.retrieval[each.name], original.retrieval[each.name], each) for each in sets}
    after = {each.name: _ndcg(model.retrieval[each.name], model.retrieval[each.name], each) for each in sets}
    points = []
    for storage in STORAGES:
        for size in sizes:
            kept = model.stored(size, storage)
            points.append(
                VectorQuality(
                    dimensions=size,
                    storage=storage,
                    bytes_per_vector=bytes_per_vector(size, storage),
                    similarity=agreement(_cosines(kept.texts, kept.texts), theirs, seed).estimate(),
                    ndcg10=_retrieval(kept, kept, sets, seed),
                )
            )
    asymmetric = None
    if model.dimensions == original.dimensions:
        mixed = agreement(_cosines(model.texts, original.texts), theirs, seed).estimate()
        asymmetric = AsymmetricUse(similarity=mixed, ndcg10=_retrieval(model, original, sets, seed))
    texts = len(model.texts)
    return EmbeddingQuality(
        texts=texts,
        pairs=texts * (texts - 1) // 2,
        points=points,
        asymmetric=asymmetric,
        original_ndcg10={each.name: mean_over_queries(before[each.name], each.groups, seed) for each in sets},
        ndcg10_change={
            each.name: change_over_queries(before[each.name], after[each.name], each.groups, seed) for each in sets
        },
    )


def _retrieval(
    asking: TextVectors, answering: TextVectors, sets: Sequence[RetrievalSet], seed: int
) -> dict[str, Estimate]:
    """Return nDCG@10 by set, with the queries of one model and the documents of another (or the same)."""
    return {
        each.name: mean_over_queries(
            _ndcg(asking.retrieval[each.name], answering.retrieval[each.name], each), each.groups, seed
        )
        for each in sets
    }


def _ndcg(asking: RetrievalVectors, answering: RetrievalVectors, retrieval: RetrievalSet) -> Array:
    return ndcg(_cosines(asking.queries, answering.documents), retrieval.relevant)


def _cosines(left: Tensor, right: Tensor) -> Array:
    """Return the cosine similarities [n, m] in float64.

    Rounded behind what float32 vectors can tell: binary vectors have few similarities, and the order in which products
    are summed would take equal ones apart.
    """
    found: Array = (unit(left.double()) @ unit(right.double()).T).cpu().numpy().round(DIGITS)
    return found
