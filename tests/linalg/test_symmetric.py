"""Products and inverses by blocks, against plain ones in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from layer_surgery import devices
from layer_surgery.linalg.symmetric import positive_inverse, sandwich, transposed_times


@pytest.fixture(autouse=True, params=[4, 5, 64])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices._BLOCK_ROWS, "cpu", request.param)


def positive(size: int) -> Tensor:
    rows = torch.randn(2 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return rows.T @ rows + torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(3, 17), (17, 3), (8, 8), (1, 1)])
def test_a_sandwich_is_the_product_and_exactly_symmetric(n: int, m: int) -> None:
    left, middle = torch.randn(n, m, dtype=torch.float64), positive(m)
    before = middle.clone()
    found = sandwich(left, middle)
    torch.testing.assert_close(found, left @ middle @ left.T)
    assert torch.equal(found, found.T)
    assert torch.equal(middle, before)


def test_a_sandwich_is_in_the_dtype_of_its_sides() -> None:
    assert sandwich(torch.randn(3, 9), positive(9)).dtype == torch.float32


@pytest.mark.parametrize("size", [1, 4, 11, 16])
def test_a_triangle_times_a_matrix(size: int) -> None:
    triangle, right = torch.linalg.cholesky(positive(size)), torch.randn(size, 7, dtype=torch.float64)
    torch.testing.assert_close(transposed_times(triangle, right), triangle.T @ right)


@pytest.mark.parametrize("size", [1, 4, 11, 16, 33])
def test_the_inverse_of_a_positive_definite_matrix(size: int) -> None:
    matrix = positive(size)
    before = matrix.clone()
    found = positive_inverse(matrix)
    assert found is not None
    torch.testing.assert_close(found, torch.linalg.inv(matrix))
    assert torch.equal(found, found.T)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("where", [0, 5, 12])
def test_what_is_not_positive_definite_has_no_inverse(where: int) -> None:
    matrix = positive(13)
    matrix[where, where] = -1.0
    assert positive_inverse(matrix) is None


def test_an_inverse_of_a_badly_conditioned_matrix_is_as_good_as_by_cholesky() -> None:
    vectors, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    matrix = (vectors * torch.logspace(0, -9, 40, dtype=torch.float64)) @ vectors.T
    matrix = (matrix + matrix.T) / 2
    found = positive_inverse(matrix)
    assert found is not None
    unit = torch.eye(40, dtype=torch.float64)
    by_cholesky = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    errors = [float((inverse @ matrix - unit).norm()) for inverse in (found, by_cholesky)]
    assert errors[0] <= 10 * errors[1]
