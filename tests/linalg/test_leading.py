"""The way for wide matrices, against the exact one: components, orders of columns, and which is taken when."""

from __future__ import annotations

import pytest
import torch
from tiny_models import largest_difference
from torch import Tensor

from layer_surgery.linalg import blockwise_nystrom
from layer_surgery.linalg.blockwise_nystrom import blockwise_column_order
from layer_surgery.linalg.decomposition import WIDE, takes_leading
from layer_surgery.linalg.leading import leading_eigenpairs, leading_whitened_svd
from layer_surgery.linalg.low_rank import Factors, shrunk, whitened_svd
from layer_surgery.linalg.nystrom import column_order, dropped_cost

SHAPES = [(120, 120), (120, 300), (300, 120)]
#: A fraction of the smaller side for which the sketch is smaller than the matrix, and one for which it is not.
SHARES = [1 / 4, 3 / 4]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int) -> Tensor:
    """Return a damped second moment [size, size] of values of which few directions matter, as in a model."""
    turned = [torch.linalg.qr(random(size, size, seed=seed + k)).Q for k in (100, 200)]
    rows = random(4 * size, size, seed=seed) @ turned[0] * torch.logspace(0, -1.5, size).double() @ turned[1]
    return shrunk(rows.T @ rows / len(rows), len(rows))


def problem(out: int, in_: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, A and B."""
    return random(out, in_).float() / in_**0.5, moment(in_, 1), 1e-3 * moment(out, 2)


def cost(weight: Tensor, inputs: Tensor, outputs: Tensor | None, factors: Factors, rank: int) -> float:
    """Return `1/2 tr(B D A D^T)` of a truncation, from the definition."""
    change = weight.double() - factors.left[:, :rank] @ factors.right[:rank]
    sensitive = change if outputs is None else outputs @ change
    return 0.5 * float(torch.trace(sensitive @ inputs @ change.T))


# Components


@pytest.mark.parametrize("metric", ["inputs", "both"])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES)
def test_truncations_cost_what_their_values_say_and_hardly_more_than_the_best(
    shape: tuple[int, int], share: float, metric: str
) -> None:
    weight, inputs, outputs = problem(*shape)
    outputs_or_none = outputs if metric == "both" else None
    rank = int(share * min(shape))
    exact = whitened_svd(weight, inputs, outputs_or_none)
    found = leading_whitened_svd(weight, inputs, outputs_or_none, rank)
    assert found.factors.left.shape == (shape[0], rank) and found.factors.right.shape == (rank, shape[1])
    assert len(found.values) == min(shape) and (found.values.diff() <= 0).all()
    for each in (0, rank // 4, rank // 2, rank):
        best = cost(weight, inputs, outputs_or_none, exact.factors, each)
        assert cost(weight, inputs, outputs_or_none, found.factors, each) == pytest.approx(best, rel=1e-2)
        assert 0.5 * float((found.values[each:] ** 2).sum()) == pytest.approx(best, rel=1e-2)
    assert float((found.values**2).sum()) == pytest.approx(float((exact.values**2).sum()), rel=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_hardly_any_components_leave_the_rest_of_the_trace(rank: int) -> None:
    weight, inputs, outputs = problem(120, 300)
    found, exact = leading_whitened_svd(weight, inputs, outputs, rank), whitened_svd(weight, inputs, outputs)
    assert found.factors.left.shape == (120, rank)
    assert float((found.values[rank:] ** 2).sum()) == pytest.approx(float((exact.values[rank:] ** 2).sum()), rel=1e-4)


def test_all_components_multiply_to_the_weight() -> None:
    weight, inputs, outputs = problem(120, 300)
    left, right = leading_whitened_svd(weight, inputs, outputs).factors
    assert largest_difference(left @ right, weight.double()) < 1e-4 * float(weight.abs().max())


def test_a_sketch_is_the_same_each_time_and_leaves_the_users_generator_alone() -> None:
    weight, inputs, outputs = problem(120, 300)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = leading_whitened_svd(weight, inputs, outputs, 30)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    other = leading_whitened_svd(weight, inputs, outputs, 30)
    assert torch.equal(one.values, other.values) and torch.equal(one.factors.left, other.factors.left)


def test_leading_pairs_of_a_known_spectrum() -> None:
    """With gaps, the iteration has converged: the vectors are the known ones up to their sign."""
    known = torch.linalg.qr(random(100, 100)).Q
    values = torch.logspace(2, -6, 100).double()
    found, vectors = leading_eigenpairs(known @ torch.diag(values) @ known.T, 20)
    assert found.tolist() == pytest.approx(values[:20].tolist(), rel=1e-6)
    assert largest_difference((vectors * known[:, :20]).sum(dim=0).abs(), torch.ones(20).double()) < 1e-6


# Columns


@pytest.mark.parametrize("metric", ["inputs", "both"])
@pytest.mark.parametrize(("block", "candidates"), [(64, 256), (20, 20), (1, 1)])
def test_columns_go_in_blocks_as_they_go_one_by_one(
    block: int, candidates: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise_nystrom, "_BLOCK", block)
    monkeypatch.setattr(blockwise_nystrom, "_CANDIDATES", candidates)
    weight, inputs, outputs = problem(60, 150)
    outputs_or_none = outputs if metric == "both" else None
    exact = column_order(weight, inputs, outputs_or_none)
    found = blockwise_column_order(weight, inputs, outputs_or_none)
    assert sorted(found.order.tolist()) == list(range(150))
    assert torch.equal(weight, problem(60, 150)[0]), "the weight was changed"
    assert found.total == pytest.approx(exact.total, rel=1e-6)
    for kept in (0, 15, 75, 120, 149):
        expected = float(exact.costs()[kept])
        assert float(found.costs()[kept]) == pytest.approx(expected, rel=1e-5), kept
        columns = found.order[:kept].sort().values
        assert dropped_cost(weight, inputs, outputs_or_none, columns) == pytest.approx(expected, rel=1e-5), kept


def test_inputs_that_are_not_positive_definite_are_refused() -> None:
    with pytest.raises(ValueError, match="damp it"):
        blockwise_column_order(random(3, 4), torch.zeros(4, 4).double())


# Which way


@pytest.mark.parametrize(
    ("way", "sides", "leading"),
    [
        ("auto", (WIDE - 1, WIDE - 1), False),
        ("auto", (8, WIDE), True),
        ("exact", (WIDE, WIDE), False),
        ("leading", (8, 8), True),
    ],
)
def test_auto_is_leading_for_wide_matrices_only(way: str, sides: tuple[int, int], leading: bool) -> None:
    assert takes_leading(way, *sides) is leading  # type: ignore[arg-type]
