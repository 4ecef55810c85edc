"""The linear map in the place of an MLP: best of its rank in the metric, at the cost that is said, without padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layer_surgery.calibration.bypass import LinearMap, best_map, bias_of
from layer_surgery.walk.moments import MapRecorder, MapSums

D = 6


def white(tokens: int, generator: torch.Generator) -> Tensor:
    """Return rows [tokens, D] whose centred second moment is exactly the identity, which shrinkage leaves as it is."""
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    x -= x.mean(dim=0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / tokens)).T + 3.0


def sums_of(x: Tensor, y: Tensor) -> MapSums:
    return MapSums(x.sum(0), y.sum(0), x.T @ x, y.T @ y, y.T @ x, len(x))


def metric(generator: torch.Generator) -> Tensor:
    g = torch.randn(40, D, generator=generator, dtype=torch.float64)
    return g.T @ g / 40


def predicted(found: LinearMap, rank: int, x: Tensor) -> Tensor:
    factors = found.factors.left[:, :rank], found.factors.right[:rank]
    return x @ factors[1].T @ factors[0].T + bias_of(factors, found.mean_input, found.mean_output)


def cost(error: Tensor, b: Tensor) -> float:
    return 0.5 * float((error @ b * error).sum(dim=1).mean())


def test_the_cost_of_every_rank_is_what_the_map_of_that_rank_leaves() -> None:
    generator = torch.Generator().manual_seed(0)
    x, b = white(50, generator), metric(generator)
    y = torch.tanh(x @ torch.randn(D, D, generator=generator, dtype=torch.float64)) + 5.0
    found = best_map(sums_of(x, y), b, 0, "mlp")
    costs = found.worth.costs()
    for rank in range(D + 1):
        assert abs(cost(y - predicted(found, rank, x), b) - costs[rank]) < 1e-9
    assert costs[0] > 2 * costs[D] > 0
    # Descent finds nothing better of rank 2.
    left, right = (torch.randn(D, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    bias = y.mean(dim=0).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([left, right, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = y - (x @ right @ left.T + bias)
        value = 0.5 * (error @ b * error).sum(dim=1).mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert costs[2] < float(loss().detach()) < 1.001 * costs[2]


def test_a_linear_module_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    x = white(50, generator)
    matrix = torch.randn(D, 2, generator=generator, dtype=torch.float64) @ torch.randn(2, D, dtype=torch.float64)
    found = best_map(sums_of(x, x @ matrix.T - 1.0), metric(generator), 0, "mlp")
    assert found.worth.costs()[2] < 1e-12 and found.worth.costs()[1] > 1e-3
    assert torch.allclose(predicted(found, 2, x), x @ matrix.T - 1.0, atol=1e-6)


def test_the_recorder_leaves_padding_out() -> None:
    module = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, D)).double()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    recorder = MapRecorder(module)
    with recorder.recording(), torch.no_grad():
        for row in range(2):  # micro-batches add up
            recorder.start_batch(valid[row : row + 1])
            module(x[row : row + 1])
    module(x)  # not recorded
    rows, given = x[valid], module(x)[valid].detach()
    assert recorder.sums is not None and recorder.sums.tokens == 8
    expected = sums_of(rows, given)
    for name in ("inputs", "outputs", "input_squares", "output_squares", "products"):
        assert torch.allclose(getattr(recorder.sums, name), getattr(expected, name)), name
