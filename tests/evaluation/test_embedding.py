"""Measurements of vectors: by definition, by other libraries, and where the answer is known."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from layer_surgery.data.retrieval import RetrievalSet
from layer_surgery.errors import DataError
from layer_surgery.evaluation import similarities
from layer_surgery.evaluation.embedding import RetrievalVectors, TextVectors, embedding_quality, halves
from layer_surgery.evaluation.ranking import change_over_queries, mean_over_queries, ndcg
from layer_surgery.evaluation.similarities import agreement, agreement_change
from layer_surgery.vectors.storage import bytes_per_vector, prefix, read_back
from layer_surgery.vectors.unit import unit


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def products(vectors: Tensor) -> np.ndarray:
    return (unit(vectors) @ unit(vectors).T).numpy()


def test_the_correlation_is_spearmans_over_all_pairs() -> None:
    ours, theirs = products(random(12, 4)), products(random(12, 5, seed=1)).round(1)  # with ties
    pairs = np.triu_indices(12, 1)
    expected = scipy.stats.spearmanr(ours[pairs], theirs[pairs]).statistic
    assert agreement(ours, theirs, seed=0).value == pytest.approx(expected, rel=1e-12)


def test_resamples_are_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resample by its definition: the pairs of the drawn texts, but for those of a text with its own copy."""
    monkeypatch.setattr(similarities, "RESAMPLES", 5)
    monkeypatch.setattr(similarities, "_AT_A_TIME", 2 * 7)  # two at a time
    ours, theirs = products(random(7, 4)), products(random(7, 4, seed=1))
    x, y = np.zeros((7, 7)), np.zeros((7, 7))
    different = ~np.eye(7, dtype=bool)
    x[different], y[different] = (scipy.stats.rankdata(each[different]) for each in (ours, theirs))
    found = agreement(ours, theirs, seed=3).resampled
    generator = np.random.default_rng(3)
    assert len(found) == 5
    for value in found:
        drawn = np.repeat(np.arange(7), generator.multinomial(7, np.full(7, 1 / 7)))
        pairs = [(i, j) for i in drawn for j in drawn if i != j]
        expected = np.corrcoef([x[p] for p in pairs], [y[p] for p in pairs])[0, 1]
        assert value == pytest.approx(expected, rel=1e-9)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Texts drawn from one distribution; the truth is the correlation over very many of them."""

    def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        vectors = random(count, 6, seed=seed)
        return products(vectors + 0.6 * random(count, 6, seed=seed + 1)), products(vectors)

    truth = agreement(*drawn(900, 10_000), seed=0).value
    intervals = [agreement(*drawn(40, seed), seed=0).estimate() for seed in range(0, 120, 2)]
    held = sum(each.low <= truth <= each.high for each in intervals)
    assert 0.85 * len(intervals) <= held < len(intervals)


def test_the_change_between_two_models_is_paired() -> None:
    vectors = random(60, 8)
    theirs = products(vectors)
    near, far = (agreement(products(vectors + s * random(60, 8, seed=2)), theirs, seed=0) for s in (0.30, 0.33))
    change = agreement_change(far, near)
    assert change.value == pytest.approx(near.value - far.value)
    assert 0 < change.low < change.value < change.high  # though the intervals of the two overlap
    assert near.estimate().low < far.estimate().high


@pytest.mark.parametrize(("texts", "match"), [(random(2, 3), "three texts"), (torch.ones(5, 3), "alike")])
def test_refused_texts(texts: Tensor, match: str) -> None:
    similar = products(texts).round(6)
    with pytest.raises(DataError, match=match):
        agreement(similar, similar, seed=0)


def test_ndcg_of_known_places() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.1, 0.9, 0.5], [0.5, 0.9, 0.1]])
    relevant = [frozenset({0}), frozenset({0}), frozenset({0, 2})]
    ideal = 1 + 1 / math.log2(3)
    expected = [1.0, 1 / math.log2(4), (1 / math.log2(3) + 1 / math.log2(4)) / ideal]
    np.testing.assert_allclose(ndcg(scores, relevant), expected)
    np.testing.assert_allclose(ndcg(scores, relevant, k=2), [1.0, 0.0, (1 / math.log2(3)) / ideal])
    np.testing.assert_allclose(ndcg(scores, relevant, k=1), [1.0, 0.0, 0.0])


@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_ndcg_of_ties_is_the_mean_over_their_orders(k: int) -> None:
    row = [0.5, 0.7, 0.5, 0.1, 0.5, 0.1]
    wanted = frozenset({0, 1, 5})
    gains = []
    for order in permutations(range(6)):
        if all(row[a] >= row[b] for a, b in pairwise(order)):
            gains.append(sum(1 / math.log2(place + 2) for place in range(min(k, 6)) if order[place] in wanted))
    ideal = sum(1 / math.log2(place + 2) for place in range(min(k, 3)))
    assert ndcg(np.array([row]), [wanted], k=k)[0] == pytest.approx(np.mean(gains) / ideal)


def test_queries_are_resampled_by_the_text_they_are_from() -> None:
    """Queries of one text that all do alike are one piece of evidence, not ten."""
    groups = [text for text in range(8) for _ in range(10)]
    values = np.repeat([0.1, 0.9, 0.4, 0.6, 0.2, 0.8, 0.5, 0.3], 10)
    together, apart = (mean_over_queries(values, each, seed=0) for each in (groups, range(80)))
    assert together.value == pytest.approx(values.mean()) == pytest.approx(apart.value)
    assert (together.resampled, apart.resampled) == (8, 80)
    assert together.high - together.low > 2.5 * (apart.high - apart.low)
    change = change_over_queries(values, values + 0.25, groups, seed=0)
    assert (change.value, change.low, change.high) == pytest.approx((0.25, 0.25, 0.25))


def test_what_is_left_of_stored_vectors() -> None:
    vectors = unit(random(50, 36))
    assert [bytes_per_vector(36, each) for each in ("float32", "int8", "binary")] == [144, 36, 5]
    torch.testing.assert_close(read_back(vectors, "float32"), vectors.float())
    step = vectors.abs().max() / 127
    rounded = (vectors / step).round()
    assert int(rounded.abs().max()) == 127
    torch.testing.assert_close(read_back(vectors, "int8"), unit(rounded).float())
    assert float((read_back(vectors, "int8").double() - vectors).abs().max()) < float(step)
    signs = read_back(vectors, "binary").double()
    differ = ((vectors[0] > 0) != (vectors[1] > 0)).sum()
    assert float(signs[0] @ signs[1]) == pytest.approx(1 - 2 * int(differ) / 36)
    with pytest.raises(ValueError, match="'int4'; allowed: float32, int8, binary"):
        read_back(vectors, "int4")


def test_a_prefix_has_length_one() -> None:
    vectors = random(5, 8)
    torch.testing.assert_close(prefix(vectors, 3), vectors[:, :3] / vectors[:, :3].norm(dim=1, keepdim=True))


def a_set(name: str = "passage") -> RetrievalSet:
    return RetrievalSet(
        name=name,
        queries=tuple(f"query {n}" for n in range(20)),
        documents=tuple(f"document {n}" for n in range(60)),
        relevant=tuple(frozenset({3 * n, 3 * n + 1}) for n in range(20)),
        groups=tuple(n // 4 for n in range(20)),
    )


def some_vectors(size: int = 32, noise: float = 0.0, scale: float = 5.0) -> TextVectors:
    """Return vectors in which queries are near their documents, and the first numbers say most."""
    weights = torch.linspace(2, 0.2, size, dtype=torch.float64)
    documents = random(60, size, seed=1) * weights
    queries = documents[::3] + 0.7 * random(20, size, seed=2) * weights
    texts = random(40, size, seed=3) * weights
    made = [scale * (each + noise * random(*each.shape, seed=9)) for each in (texts, queries, documents)]
    return TextVectors(made[0], {"passage": RetrievalVectors(made[1], made[2])})


def test_a_model_is_as_good_as_itself() -> None:
    found = embedding_quality(some_vectors(), some_vectors(scale=0.1), [a_set()], halves(32), seed=0)
    assert (found.texts, found.pairs) == (40, 780)
    first = found.points[0]
    assert (first.dimensions, first.storage, first.bytes_per_vector) == (32, "float32", 128)
    assert (first.similarity.value, first.similarity.low, first.similarity.high) == pytest.approx((1, 1, 1))
    assert found.asymmetric is not None
    assert found.asymmetric.similarity.value == pytest.approx(1)
    assert first.ndcg10 == found.asymmetric.ndcg10 == found.original_ndcg10
    assert 0.3 < first.ndcg10["passage"].value < 0.95
    change = found.ndcg10_change["passage"]
    assert (change.value, change.low, change.high) == (0, 0, 0)


def test_less_is_kept_in_fewer_numbers_and_bits() -> None:
    found = embedding_quality(some_vectors(), some_vectors(), [a_set()], halves(32), seed=0)
    kept = {(each.dimensions, each.storage): each.similarity.value for each in found.points}
    assert list(kept) == [(size, kind) for kind in ("float32", "int8", "binary") for size in (32, 16, 8)]
    for kind in ("float32", "int8"):  # signs weigh all numbers alike, so that fewer may be better
        assert kept[32, kind] > kept[16, kind] > kept[8, kind] > 0.3
    for size in (32, 16, 8):
        assert kept[size, "int8"] == pytest.approx(kept[size, "float32"], abs=0.01)
        assert kept[size, "int8"] > kept[size, "binary"] + 0.02


def test_a_turned_model_keeps_similarities_but_not_beside_the_original() -> None:
    turn, _ = torch.linalg.qr(random(32, 32, seed=5))
    plain = some_vectors()
    own = plain.retrieval["passage"]
    turned = TextVectors(plain.texts @ turn, {"passage": RetrievalVectors(own.queries @ turn, own.documents @ turn)})
    found = embedding_quality(turned, plain, [a_set()], [32], seed=0)
    assert found.points[0].similarity.value == pytest.approx(1)
    assert found.ndcg10_change["passage"].value == pytest.approx(0)
    assert found.asymmetric is not None
    assert abs(found.asymmetric.similarity.value) < 0.3
    assert found.asymmetric.ndcg10["passage"].value < 0.5 * found.original_ndcg10["passage"].value


def test_a_worse_model_is_worse_everywhere_and_better_beside_the_original() -> None:
    found = embedding_quality(some_vectors(noise=0.6), some_vectors(), [a_set()], [32], seed=0)
    assert found.asymmetric is not None
    assert found.points[0].similarity.high < found.asymmetric.similarity.value < 1
    change = found.ndcg10_change["passage"]
    assert change.value == pytest.approx(
        found.points[0].ndcg10["passage"].value - found.original_ndcg10["passage"].value
    )
    assert change.value < 0


def test_a_smaller_model_cannot_be_used_beside_the_original() -> None:
    assert embedding_quality(some_vectors(16), some_vectors(), [], [16], seed=0).asymmetric is None


def test_equally_many_bits_are_equally_far() -> None:
    """By counting bits in whole numbers: sums of products in another order are not equal any more."""
    model = some_vectors()
    own = model.retrieval["passage"]
    for size in (11, 21, 31):
        queries, documents = (unit(each[:, :size]) > 0 for each in (own.queries, own.documents))
        same = (queries[:, None] == documents[None]).sum(dim=2).double().numpy()
        expected = ndcg(same, a_set().relevant).mean()
        found = embedding_quality(model, model, [a_set()], [size], seed=0).points[2].ndcg10["passage"]
        assert found.value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("size", "expected"), [(768, [768, 384, 192, 96, 48, 24, 12]), (12, [12]), (5, [5])])
def test_sizes_are_halved(size: int, expected: list[int]) -> None:
    assert halves(size) == expected
