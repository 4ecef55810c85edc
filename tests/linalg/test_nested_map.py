"""The map to fewer numbers: exact where nothing is lost, best in its metric, nested, better than PCA and truncation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from layer_surgery.linalg.nested_map import NestedMap, agreement, best_in_scales, nested_map


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(vectors: Tensor) -> Tensor:
    unit = normalize(vectors, dim=1)
    return unit @ unit.T


def clustered(texts: int, seed: int) -> Tensor:
    """Return vectors as embedding models give them: a common part, directions of falling weight, some shared noise."""
    turn, _ = torch.linalg.qr(random(32, 32, seed=100))
    common = 1.5 * normalize(random(1, 32, seed=101), dim=1)
    lengths = 0.5 + random(texts, 1, seed=seed + 1).abs()
    weights = torch.linspace(0, -3, 32, dtype=torch.float64).exp()
    return common + lengths * (random(texts, 32, seed=seed) * weights) @ turn


def correlation(mapping: Tensor | NestedMap, vectors: Tensor) -> float:
    rows, columns = torch.triu_indices(len(vectors), len(vectors), offset=1)
    given = mapping(vectors) if isinstance(mapping, NestedMap) else vectors @ mapping.T
    mapped, whole = cosines(given), cosines(vectors)
    return float(torch.corrcoef(torch.stack([mapped[rows, columns], whole[rows, columns]]))[0, 1])


def principal_components(vectors: Tensor, size: int) -> Tensor:
    """Return the map that sentence-transformers' example stores: components of centred vectors, without the centre."""
    unit = normalize(vectors, dim=1)
    return torch.linalg.svd(unit - unit.mean(dim=0), full_matrices=False)[2][:size]


def test_nothing_is_lost_in_a_subspace() -> None:
    vectors = random(40, 5) @ random(5, 12, seed=1)
    mapping = nested_map(vectors, 5)
    torch.testing.assert_close(cosines(mapping(vectors)), cosines(vectors), rtol=0, atol=1e-9)
    other = random(7, 5, seed=2) @ random(5, 12, seed=1)
    torch.testing.assert_close(cosines(mapping(other)), cosines(other), rtol=0, atol=1e-9)


def test_with_equal_scales_it_is_the_singular_value_decomposition() -> None:
    x = normalize(random(30, 6), dim=1)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    found = best_in_scales(x, torch.ones(30, dtype=torch.float64), 3)
    torch.testing.assert_close(found.T @ found, directions[:3].T @ directions[:3])


def test_no_other_map_is_nearer_in_the_same_scales() -> None:
    x, scales = normalize(random(25, 6), dim=1), 0.5 + random(25, seed=3).abs()

    def error(mapping: Tensor) -> Tensor:
        mapped = scales[:, None] * (x @ mapping.T)
        return (mapped @ mapped.T - x @ x.T).square().sum()

    found = best_in_scales(x, scales, 2)
    least = float(error(found))
    for seed in range(5):  # found without the closed form, from anywhere
        other = random(2, 6, seed=seed).requires_grad_()
        optimizer = torch.optim.LBFGS([other], max_iter=300, tolerance_change=1e-14, line_search_fn="strong_wolfe")

        def step(optimizer: torch.optim.Optimizer = optimizer, other: Tensor = other) -> Tensor:
            optimizer.zero_grad()
            loss = error(other)
            loss.backward()
            return loss

        optimizer.step(step)
        assert float(error(other.detach())) > least * (1 - 1e-9)


def test_each_prefix_is_the_best_of_its_size_in_the_same_scales() -> None:
    x, scales = normalize(random(25, 6), dim=1), 0.5 + random(25, seed=3).abs()
    whole = best_in_scales(x, scales, 5)
    for size in (1, 2, 4):
        torch.testing.assert_close(best_in_scales(x, scales, size), whole[:size])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_similarities_of_other_texts_are_nearer_than_by_pca_or_truncation(size: int) -> None:
    vectors, other = clustered(400, seed=1), clustered(200, seed=50)
    mapping, components = nested_map(vectors, size), principal_components(vectors, size)
    assert mapping.weight.shape == (size, 32) and mapping.bias.shape == (size,)
    for part in (size, size // 2):
        ours = correlation(mapping.prefix(part), other)
        assert ours > correlation(components[:part], other)
        assert ours > correlation(torch.eye(part, 32, dtype=torch.float64), other)


def drawn(texts: int, seed: int, kind: str) -> Tensor:
    values = random(texts, 16, seed=seed) @ random(16, 32, seed=70)
    return values.square() if kind == "squares" else torch.relu(values + 1)


def test_rounds_are_better_than_both_decompositions() -> None:
    vectors, other = drawn(400, 1, "squares"), drawn(200, 50, "squares")
    _, _, directions = torch.linalg.svd(normalize(vectors, dim=1), full_matrices=False)
    assert correlation(nested_map(vectors, 8), other) > correlation(directions[:8], other) + 0.02
    assert correlation(nested_map(vectors, 8), other) > correlation(principal_components(vectors, 8), other) + 0.02


def test_it_is_as_good_as_pca_where_pca_is_better_than_the_decomposition() -> None:
    size = 4
    vectors, other = drawn(400, 1, "rectified"), drawn(200, 50, "rectified")
    _, _, directions = torch.linalg.svd(normalize(vectors, dim=1), full_matrices=False)
    components = principal_components(vectors, size)
    assert correlation(components, other) > correlation(directions[:size], other) + 0.01
    assert correlation(nested_map(vectors, size), other) > correlation(components, other) - 0.005


def test_a_text_of_which_nothing_is_kept_stops_nothing() -> None:
    vectors = clustered(100, seed=1)
    vectors[0] = 0.0
    vectors[0, 5] = 1.0
    vectors[1:, 5] *= 1e-4
    assert all(bool(each.isfinite().all()) for each in nested_map(vectors, 4))


def test_lengths_and_axes_do_not_matter() -> None:
    vectors = clustered(60, seed=1)
    turn, _ = torch.linalg.qr(random(32, 32, seed=7))
    mapped = nested_map(vectors, 4)(vectors)
    longer = vectors * (0.1 + random(60, 1, seed=8).abs())
    torch.testing.assert_close(cosines(nested_map(longer, 4)(longer)), cosines(mapped), rtol=0, atol=1e-6)
    turned = vectors @ turn
    torch.testing.assert_close(cosines(nested_map(turned, 4)(turned)), cosines(mapped), rtol=0, atol=1e-6)


def test_mapped_vectors_have_length_one_on_average() -> None:
    vectors = clustered(60, seed=1)
    mapping = nested_map(7 * vectors, 4)
    assert float(mapping(vectors).square().sum(dim=1).mean()) == pytest.approx(1)
    assert bool((mapping.weight.gather(1, mapping.weight.abs().argmax(dim=1, keepdim=True)) > 0).all())


def test_agreement_is_the_weighted_correlation_over_all_pairs() -> None:
    x = normalize(random(12, 16), dim=1)
    mapping = NestedMap(random(16, 16, seed=1), random(16, seed=2))
    rows, columns = np.triu_indices(12, k=1)
    whole = (x @ x.T).numpy()[rows, columns]
    found = []
    for size in (16, 8):
        cut = normalize((x @ mapping.weight.T + mapping.bias)[:, :size], dim=1)
        found.append(np.corrcoef((cut @ cut.T).numpy()[rows, columns], whole)[0, 1])
    assert agreement(x, mapping, [16]) == pytest.approx(found[0], abs=1e-12)
    assert agreement(x, mapping, [16, 8]) == pytest.approx((found[0] + 0.5 * found[1]) / 1.5, abs=1e-12)
    nothing = NestedMap(torch.zeros(16, 16, dtype=torch.float64), torch.ones(16, dtype=torch.float64))
    assert agreement(x, nothing, [16]) == 0


@pytest.mark.parametrize("size", [8, 16])
def test_steps_and_a_bias_are_better_than_rounds_at_the_size_and_at_its_half(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts that the map has not seen."""
    vectors, other = drawn(400, 1, "squares"), drawn(300, 51, "squares")
    climbed = nested_map(vectors, size)
    monkeypatch.setattr("layer_surgery.linalg.nested_map._STEPS", ())
    begun = nested_map(vectors, size)
    assert not begun.bias.any() and climbed.bias.any()
    for part in (size, size // 2):
        assert 1 - correlation(climbed.prefix(part), other) < 0.95 * (1 - correlation(begun.prefix(part), other))


def test_steps_that_fit_only_the_texts_given_are_not_taken() -> None:
    """Of noise without any structure nothing is to be learnt, but a decomposition of much of it keeps something."""
    x, other = normalize(random(64, 32), dim=1), random(300, 32, seed=1)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    assert correlation(nested_map(x, 8), other) > correlation(directions[:8], other) - 0.02


@pytest.mark.parametrize(
    ("vectors", "size", "match"),
    [
        (random(10, 6), 7, "7 numbers are asked for, and 10 vectors span 6; allowed: 1 to 6"),
        (random(10, 6), 0, "0 numbers"),
        (random(4, 6), 5, "4 vectors span 4"),
        (torch.zeros(4, 3), 2, "zero"),
        (torch.full((4, 3), torch.nan), 2, "not finite"),
    ],
)
def test_what_cannot_be_mapped_is_refused(vectors: Tensor, size: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        nested_map(vectors, size)
