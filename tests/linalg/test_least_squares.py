"""Ridge least squares from sums, against solutions from the rows themselves that share no code with it."""

from __future__ import annotations

import pytest
import torch
from surgery_helpers import by_rows, held_out_error
from tiny_models import largest_difference
from torch import Tensor

from layer_surgery import devices
from layer_surgery.linalg import least_squares
from layer_surgery.linalg.least_squares import RIDGES, RidgeProblem, Sums, add_gram

OUT, IN = 5, 9


def rows(count: int, *, seed: int, noise: float = 0.3, in_: int = IN) -> tuple[Tensor, Tensor]:
    """Return inputs [count, in] with unequal scales and targets [count, out] that are nearly linear in them."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(OUT, in_, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    z = torch.randn(count, in_, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, in_).double()
    return z, z @ true.T + noise * torch.randn(count, OUT, generator=generator, dtype=torch.float64)


def start(in_: int = IN) -> Tensor:
    return torch.randn(OUT, in_, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def sums(z: Tensor, y: Tensor, dtype: torch.dtype = torch.float64) -> Sums:
    result = Sums.zeros(y.shape[1], z.shape[1], like=z.to(dtype))
    result.add(z.to(dtype), y.to(dtype))
    return result


def brute_force(
    weight: Tensor, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]
) -> tuple[float | None, float]:
    """Return the ridge with the least held-out error, of all of them and none, and that error."""
    errors: dict[float | None, float] = {None: held_out_error(weight, *held)}
    errors |= {ridge: held_out_error(by_rows(weight, *train, ridge), *held) for ridge in RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    return best, errors[best]


# The solution


@pytest.mark.parametrize(("tokens", "noise"), [(200, 0.3), (100, 5.0), (12, 2.0), (6, 0.3)])
def test_the_chosen_ridge_is_the_best_on_held_out_rows_and_the_solution_uses_all(tokens: int, noise: float) -> None:
    train, held = rows(tokens, seed=1, noise=noise), rows(40, seed=2, noise=noise)
    solution = RidgeProblem(sums(*train), sums(*held)).solve(start())
    ridge, error = brute_force(start(), train, held)
    assert solution.ridge == ridge is not None
    assert solution.error_before == pytest.approx(held_out_error(start(), *held), rel=1e-10)
    assert solution.error_after == pytest.approx(error, rel=1e-9)
    z, y = (torch.cat(pair) for pair in zip(train, held, strict=True))
    assert largest_difference(solution.weight, by_rows(start(), z, y, ridge)) < 1e-9


def test_the_cases_above_choose_different_ridges() -> None:
    """Guards the test above: not one of them is the answer to everything."""
    chosen = {
        brute_force(start(), rows(tokens, seed=1, noise=noise), rows(40, seed=2, noise=noise))[0]
        for tokens, noise in [(200, 0.3), (100, 5.0), (12, 2.0), (6, 0.3)]
    }
    assert len(chosen) >= 3


def test_exactly_linear_targets_are_followed_by_the_least_ridge() -> None:
    train, held = rows(100, seed=1, noise=0.0), rows(30, seed=2, noise=0.0)
    solution = RidgeProblem(sums(*train), sums(*held)).solve(start())
    assert solution.ridge == RIDGES[0]
    assert solution.error_after < 2e-3 * solution.error_before


def test_a_nearly_silent_input_gets_no_large_weight() -> None:
    """Were it followed, all weights of a row would be held badly by the few bits that its largest needs."""
    loud, silent = rows(300, seed=1, noise=0.0)[0], torch.randn(300, 1).double() * 1e-4
    z, weight = torch.cat([loud, silent], dim=1), torch.cat([start(), torch.ones(OUT, 1).double()], dim=1)
    y = z @ weight.T + 5000 * silent
    problem = RidgeProblem(sums(z[:250], y[:250]), sums(z[250:], y[250:]))
    for solution in (problem.solve(weight), problem.solve_by_factors(weight)):
        assert float(solution.weight.abs().max()) < 2 * float(weight.abs().max())


def test_a_weight_that_is_right_already_stays_as_it_is() -> None:
    z, _ = rows(100, seed=1)
    held, _ = rows(30, seed=2)
    solution = RidgeProblem(sums(z, z @ start().T), sums(held, held @ start().T)).solve(start())
    assert largest_difference(solution.weight, start()) < 1e-9
    assert abs(solution.error_before) < 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_targets_that_cannot_be_predicted_leave_held_out_rows_no_worse(seed: int) -> None:
    """Targets are the weight's own outputs on held-out rows, and noise on the others: no change is best."""
    z, _ = rows(8, seed=seed)
    held, _ = rows(30, seed=seed + 100)
    noise = torch.randn(8, OUT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    solution = RidgeProblem(sums(z, z @ start().T + noise), sums(held, held @ start().T)).solve(start())
    assert solution.ridge is None
    assert torch.equal(solution.weight, start())
    assert solution.error_after == solution.error_before


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tokens", [3, 20])
def test_the_held_out_error_never_rises(seed: int, tokens: int) -> None:
    train, held = rows(tokens, seed=seed, noise=3.0), rows(10, seed=seed + 50, noise=3.0)
    solution = RidgeProblem(sums(*train), sums(*held)).solve(start())
    assert solution.error_after <= solution.error_before


def test_inputs_that_are_all_zero_change_nothing() -> None:
    z, y = torch.zeros(20, IN).double(), torch.ones(20, OUT).double()
    solution = RidgeProblem(sums(z, y), sums(z, y)).solve(start())
    assert solution.ridge is None and torch.equal(solution.weight, start())


# Without an eigendecomposition


@pytest.mark.parametrize(("tokens", "noise"), [(200, 0.3), (200, 5.0), (12, 0.3)])
def test_factors_choose_the_same_ridge_as_the_whole_spectrum(tokens: int, noise: float) -> None:
    problem = RidgeProblem(sums(*rows(tokens, seed=1, noise=noise)), sums(*rows(40, seed=2, noise=noise)))
    expected, found = problem.solve(start()), problem.solve_by_factors(start())
    assert found.ridge == expected.ridge is not None
    assert found.error_before == pytest.approx(expected.error_before, rel=1e-9)
    assert found.error_after == pytest.approx(expected.error_after, rel=1e-9)
    assert largest_difference(found.weight, expected.weight) < 1e-9
    assert problem.solve(start()).error_after == expected.error_after, "the sums were changed"


@pytest.mark.parametrize("tokens", [4, 30, 200])
def test_factors_of_float32_sums_follow_as_well_as_the_whole_spectrum(tokens: int) -> None:
    """With fewer rows than inputs too, where the least ridges are below the rounding of the sums."""
    train, held = rows(tokens, seed=3, in_=40), rows(25, seed=4, in_=40)
    problem = RidgeProblem(sums(*train, dtype=torch.float32), sums(*held, dtype=torch.float32))
    expected, found = problem.solve(start(40)), problem.solve_by_factors(start(40))
    assert found.error_after <= 1.05 * expected.error_after < found.error_before
    error = held_out_error(found.weight, *(torch.cat(pair) for pair in zip(train, held, strict=True)))
    both = held_out_error(expected.weight, *(torch.cat(pair) for pair in zip(train, held, strict=True)))
    assert error <= 1.05 * both


@pytest.mark.parametrize("seed", range(3))
def test_factors_leave_a_weight_that_no_ridge_betters_as_it_is(seed: int) -> None:
    z, _ = rows(8, seed=seed)
    held, _ = rows(30, seed=seed + 100)
    noise = torch.randn(8, OUT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    solution = RidgeProblem(sums(z, z @ start().T + noise), sums(held, held @ start().T)).solve_by_factors(start())
    assert solution.ridge is None and torch.equal(solution.weight, start())
    empty = RidgeProblem(sums(0 * z, noise), sums(0 * z, noise)).solve_by_factors(start())
    assert empty.ridge is None and torch.equal(empty.weight, start())


def test_factors_share_inputs_too() -> None:
    train, held = rows(50, seed=1), rows(20, seed=2)
    owner, alone = (RidgeProblem(sums(train[0], y * train[1]), sums(held[0], y * held[1])) for y in (1, -1))
    expected = alone.solve_by_factors(start())
    for part in (alone.train, alone.held_out):
        part.inputs = torch.full_like(part.inputs, torch.nan)  # not looked at
    assert torch.equal(alone.solve_by_factors(start(), owner).weight, expected.weight)


# Rank-deficient sums


@pytest.mark.parametrize("tokens", [1, 4, 30])
def test_fewer_rows_than_inputs_in_float32_give_a_finite_solution_near_the_exact_one(tokens: int) -> None:
    train, held = rows(tokens, seed=3, in_=40), rows(25, seed=4, in_=40)
    problem = RidgeProblem(sums(*train, dtype=torch.float32), sums(*held, dtype=torch.float32))
    assert float(torch.linalg.eigvalsh(problem.train.inputs.double())[0]) < 0, "the sums are not indefinite"
    solution = problem.solve(start(40))
    assert solution.weight.isfinite().all()
    # Rounding moves what the smallest ridges give, so it may move the choice among them.
    assert solution.error_after == pytest.approx(brute_force(start(40), train, held)[1], rel=0.05)
    assert solution.error_after < solution.error_before


def test_a_gram_matrix_that_cholesky_refuses_is_solved_all_the_same() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, -1e-3], dtype=torch.float64))
    right = torch.ones(3, 2).double()
    solution = least_squares._solve_damped(gram, 1e-4, right)
    expected = right / torch.tensor([4.0 + 1e-4, 1.0 + 1e-4, 1e-4], dtype=torch.float64)[:, None]
    assert largest_difference(solution, expected) < 1e-12


# Sums


def test_sums_of_halves_add_up_to_the_whole() -> None:
    z, y = rows(31, seed=5)
    whole, halves = sums(z, y), Sums.zeros(OUT, IN, like=z)
    halves.add(z[:13], y[:13])
    halves.add(z[13:], y[13:])
    assert largest_difference(halves.inputs, whole.inputs) < 1e-13
    assert largest_difference(halves.products, whole.products) < 1e-13
    assert halves.targets == pytest.approx(whole.targets, rel=1e-14)
    assert halves.tokens == whole.tokens == 31


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_of_short_numbers_are_float32(dtype: torch.dtype) -> None:
    """4096 ones added one by one stop growing at 256 in bfloat16 and at 2048 in float16."""
    result = Sums.zeros(1, 1, like=torch.zeros(1, dtype=dtype))
    for _ in range(64):
        result.add(torch.ones(64, 1, dtype=dtype), torch.ones(64, 1, dtype=dtype))
    assert result.inputs.dtype == result.products.dtype == torch.float32
    assert float(result.inputs) == float(result.products) == result.targets == result.tokens == 4096


def test_linears_with_the_same_inputs_share_them() -> None:
    train, held = rows(50, seed=1), rows(20, seed=2)
    owner = RidgeProblem(sums(*train), sums(*held))
    alone = RidgeProblem(sums(train[0], -train[1]), sums(held[0], -held[1]))
    shared = RidgeProblem(sums(train[0], -train[1]), sums(held[0], -held[1]))
    for part in (shared.train, shared.held_out):
        part.inputs = torch.full_like(part.inputs, torch.nan)  # not looked at
    expected, found = alone.solve(start()), shared.solve(start(), owner)
    assert torch.equal(found.weight, expected.weight)
    assert found.ridge == expected.ridge and found.error_after == expected.error_after


@pytest.mark.parametrize("width", [3, 64, 65, 130])
def test_symmetric_products_by_blocks_are_the_whole_product(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices._BLOCK_ROWS, "cpu", 32)
    z = torch.randn(20, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.ones(width, width).double()
    add_gram(total, z)
    assert largest_difference(total, 1 + z.T @ z) < 1e-13
