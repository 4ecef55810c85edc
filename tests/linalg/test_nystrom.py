"""Which columns to keep: against the definition, written out, and against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from layer_surgery.linalg.low_rank import shrunk
from layer_surgery.linalg.nystrom import ColumnOrder, Direction, column_order, dropped_cost, narrowed

OUT, IN = 5, 12
#: What is left at the end is a difference of what there was at the beginning, and rounded like it.
ROUNDING = 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int, tokens: int = 40) -> Tensor:
    """Return a second moment of correlated values of very different sizes [size, size]."""
    rows = random(tokens, size, seed=seed) @ random(size, size, seed=seed + 100) * torch.logspace(-1, 1, size).double()
    return rows.T @ rows / tokens


WEIGHT, INPUTS, OUTPUTS = random(OUT, IN), moment(IN, 1), moment(OUT, 2)


def naive_cost(weight: Tensor, inputs: Tensor, outputs: Tensor, kept: list[int]) -> float:
    """Return `1/2 tr(B W (A - A_S A_SS^-1 A_S^T) W^T)`, as it is defined."""
    left = inputs
    if kept:
        left = inputs - inputs[:, kept] @ torch.linalg.inv(inputs[kept][:, kept]) @ inputs[kept]
    return 0.5 * float(torch.trace(outputs @ weight @ left @ weight.T))


def naive_order(groups: list[list[int]], direction: Direction) -> list[tuple[int, float]]:
    """Return (group, gain), first to keep first, with every candidate's cost from the definition."""

    def cost(chosen: list[int]) -> float:
        return naive_cost(WEIGHT, INPUTS, OUTPUTS, [column for number in chosen for column in groups[number]])

    left, steps = list(range(len(groups))), []
    chosen: list[int] = [] if direction == "forward" else list(left)
    while left:
        if direction == "forward":
            costs = {number: cost([*chosen, number]) for number in left}
            best = min(left, key=lambda n: costs[n])
            steps.append((best, cost(chosen) - costs[best]))
            chosen.append(best)
        else:
            costs = {number: cost([n for n in chosen if n != number]) for number in left}
            best = min(left, key=lambda n: costs[n])
            steps.append((best, costs[best] - cost(chosen)))
            chosen.remove(best)
        left.remove(best)
    return steps if direction == "forward" else steps[::-1]


GROUPS = {
    "single": [[column] for column in range(IN)],
    "pairs": [[column, column + 1] for column in range(0, IN, 2)],
    "uneven": [[3, 0, 7], [1], [2, 4, 5, 6, 11], [8, 10], [9]],
    "one": [list(range(IN))],
}
DIRECTIONS: list[Direction] = ["forward", "backward"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", GROUPS)
def test_every_step_is_the_one_of_the_definition(kind: str, direction: Direction) -> None:
    groups = GROUPS[kind]
    found = column_order(WEIGHT, INPUTS, OUTPUTS, [torch.tensor(group) for group in groups], direction=direction)
    expected = naive_order(groups, direction)
    assert found.order.tolist() == [number for number, _gain in expected]
    assert found.gains.tolist() == pytest.approx(
        [gain for _number, gain in expected], rel=1e-8, abs=ROUNDING * found.total
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_costs_are_the_definitions_at_every_number_kept(direction: Direction) -> None:
    found = column_order(WEIGHT, INPUTS, OUTPUTS, direction=direction)
    costs = found.costs()
    assert len(costs) == IN + 1
    for count in range(IN + 1):
        kept = found.order[:count]
        expected = naive_cost(WEIGHT, INPUTS, OUTPUTS, kept.tolist())
        assert float(costs[count]) == pytest.approx(expected, rel=1e-8, abs=ROUNDING * found.total)
        assert dropped_cost(WEIGHT, INPUTS, OUTPUTS, kept) == pytest.approx(
            expected, rel=1e-8, abs=ROUNDING * found.total
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_size_of_groups_is_that_of_consecutive_columns(direction: Direction) -> None:
    by_size = column_order(WEIGHT, INPUTS, OUTPUTS, 3, direction=direction)
    by_index = column_order(WEIGHT, INPUTS, OUTPUTS, list(torch.arange(IN).split(3)), direction=direction)
    assert_same(by_size, by_index)
    whole = column_order(WEIGHT, INPUTS, OUTPUTS, IN, direction=direction)
    assert whole.gains.tolist() == pytest.approx([whole.total])
    assert whole.total == pytest.approx(naive_cost(WEIGHT, INPUTS, OUTPUTS, []))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("block", [1, 5, 64])
def test_blocks_change_nothing(block: int, direction: Direction) -> None:
    weight, inputs, outputs = random(20, 150, seed=5), moment(150, 6, tokens=400), moment(20, 7)
    one = column_order(weight, inputs, outputs, direction=direction, block=1)
    assert_same(column_order(weight, inputs, outputs, direction=direction, block=block), one)


def test_backward_is_no_worse_than_forward_where_much_is_kept_and_near_the_best_of_all() -> None:
    forward = column_order(WEIGHT, INPUTS, OUTPUTS, direction="forward").costs()
    backward = column_order(WEIGHT, INPUTS, OUTPUTS, direction="backward").costs()
    for kept in (IN - 1, IN - 2):
        best = min(naive_cost(WEIGHT, INPUTS, OUTPUTS, list(chosen)) for chosen in combinations(range(IN), kept))
        assert best * (1 - 1e-9) <= float(backward[kept]) <= 1.2 * best
        assert float(backward[kept]) <= float(forward[kept]) * (1 + 1e-9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_order_does_not_depend_on_scales(direction: Direction) -> None:
    plain = column_order(WEIGHT, INPUTS, OUTPUTS, direction=direction)
    scaled = column_order(3 * WEIGHT, 0.01 * INPUTS, 7 * OUTPUTS, direction=direction)
    assert scaled.order.tolist() == plain.order.tolist()
    assert scaled.gains.tolist() == pytest.approx((0.63 * plain.gains).tolist(), rel=1e-8)
    # A channel that is twice as large and read by half the weight is the same channel.
    factors = torch.logspace(-2, 2, IN).double()
    rescaled = column_order(WEIGHT / factors, INPUTS * factors * factors[:, None], OUTPUTS, direction=direction)
    assert_same(rescaled, plain, rel=1e-7)


def test_no_output_moment_is_the_identity() -> None:
    for direction in DIRECTIONS:
        identity = column_order(WEIGHT, INPUTS, torch.eye(OUT), direction=direction)
        assert_same(column_order(WEIGHT, INPUTS, direction=direction), identity)
    kept = torch.tensor([2, 5])
    assert dropped_cost(WEIGHT, INPUTS, None, kept) == pytest.approx(dropped_cost(WEIGHT, INPUTS, torch.eye(OUT), kept))


def test_stopping_early_gives_the_beginning_and_the_cost_of_the_rest() -> None:
    for groups in (None, 2):
        full = column_order(WEIGHT, INPUTS, OUTPUTS, groups, direction="forward")
        some = column_order(WEIGHT, INPUTS, OUTPUTS, groups, direction="forward", most=4)
        assert some.order.tolist() == full.order[:4].tolist()
        assert some.costs().tolist() == pytest.approx(full.costs()[:5].tolist(), rel=1e-8)
        assert some.rest > 0 == full.rest
    with pytest.raises(ValueError, match="forward"):
        column_order(WEIGHT, INPUTS, OUTPUTS, direction="backward", most=4)


def test_columns_that_say_the_same_are_worth_nothing_the_second_time() -> None:
    mix = torch.cat([torch.eye(4), random(4, 3).abs().float()], dim=1).double()  # 7 columns of rank 4
    inputs = mix.T @ moment(4, 3) @ mix
    found = column_order(random(3, 7), inputs, direction="forward")
    assert sorted(found.order.tolist()) == list(range(7))
    assert float(found.gains[:4].sum()) == pytest.approx(found.total, rel=1e-9)
    assert found.gains[4:].abs().max() <= 1e-9 * found.total
    stopped = column_order(random(3, 7), inputs, direction="forward", most=6)
    assert stopped.order.tolist() == found.order[:6].tolist()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("groups", [None, 3])
def test_fewer_tokens_than_columns_will_do_with_damping(direction: Direction, groups: int | None) -> None:
    inputs = moment(IN, 4, tokens=6)
    with pytest.raises(ValueError, match="damp"):
        column_order(WEIGHT, inputs - 1e-6 * torch.eye(IN), OUTPUTS, 3, direction=direction)
    damped = shrunk(inputs, 6)
    found = column_order(WEIGHT, damped, OUTPUTS, groups, direction=direction)
    assert float(found.gains.sum()) == pytest.approx(naive_cost(WEIGHT, damped, OUTPUTS, []), rel=1e-8)
    assert narrowed(WEIGHT, damped, found.order[:3]).isfinite().all()


def test_the_narrowed_weight_is_the_minimum() -> None:
    kept = torch.tensor([7, 0, 3])
    best = narrowed(WEIGHT, INPUTS, kept)
    assert best.shape == (OUT, 3)

    def cost(columns: Tensor) -> float:
        change = WEIGHT.clone()
        change[:, kept] -= columns
        return 0.5 * float(torch.trace(OUTPUTS @ change @ INPUTS @ change.T))

    least = cost(best)
    assert least == pytest.approx(dropped_cost(WEIGHT, INPUTS, OUTPUTS, kept))
    assert least < cost(WEIGHT[:, kept])
    for seed in range(20):
        assert cost(best + 1e-3 * random(OUT, 3, seed=seed)) > least


def test_all_columns_give_the_weight_back_in_the_order_asked_for() -> None:
    kept = torch.arange(IN).flip(0)
    assert torch.allclose(narrowed(WEIGHT, INPUTS, kept), WEIGHT[:, kept], rtol=1e-8)
    assert dropped_cost(WEIGHT, INPUTS, OUTPUTS, kept) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("groups", [5, [torch.tensor([0, 1])], [torch.arange(IN), torch.tensor([3])], []])
def test_groups_have_every_column_once(groups: int | list[Tensor]) -> None:
    with pytest.raises(ValueError, match="columns"):
        column_order(WEIGHT, INPUTS, OUTPUTS, groups)


def test_low_precision_is_solved_in_double() -> None:
    found = column_order(WEIGHT.bfloat16(), INPUTS.float(), OUTPUTS.float())
    assert found.gains.dtype == torch.float64
    assert narrowed(WEIGHT.bfloat16(), INPUTS.float(), torch.tensor([1])).dtype == torch.float64


def assert_same(found: ColumnOrder, expected: ColumnOrder, rel: float = 1e-8) -> None:
    assert found.order.tolist() == expected.order.tolist()
    assert found.gains.tolist() == pytest.approx(expected.gains.tolist(), rel=rel, abs=ROUNDING * expected.total)
