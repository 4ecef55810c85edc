"""What is measured of an embedding model: vectors against those of the model that it was made from."""

from dataclasses import dataclass
from typing import Literal

from layer_surgery.records.interval import Interval

#: How the numbers of a vector are stored.
Storage = Literal["float32", "int8", "binary"]
STORAGES: tuple[Storage, ...] = ("float32", "int8", "binary")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A quantity of one model with its bootstrap confidence interval."""

    value: float
    low: float
    high: float
    confidence: float
    resampled: int  #: Texts, or groups of queries, that were drawn from.


@dataclass(frozen=True, kw_only=True)
class VectorQuality:
    """What vectors are worth at one size and in one way to store them."""

    dimensions: int  #: The first so many numbers of each vector.
    storage: Storage
    bytes_per_vector: int
    similarity: Estimate
    """Spearman's correlation of the similarities of all pairs of texts with those of the original's full vectors."""
    ndcg10: dict[str, Estimate]  #: By retrieval set: queries and documents both by this model.


@dataclass(frozen=True, kw_only=True)
class AsymmetricUse:
    """Queries by the smaller model, documents by the original, whose vectors are there already."""

    similarity: Estimate  #: As in `VectorQuality`, each pair with one text by either model.
    ndcg10: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class EmbeddingQuality:
    """An embedding model measured beside the original."""

    texts: int
    pairs: int  #: Of different texts.
    points: list[VectorQuality]  #: The first is at full size in float32.
    asymmetric: AsymmetricUse | None  #: None where the two models' vectors have different sizes.
    original_ndcg10: dict[str, Estimate]
    ndcg10_change: dict[str, Interval]  #: This model's - the original's, over the same queries, at full size.
