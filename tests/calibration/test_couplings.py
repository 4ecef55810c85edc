"""What layers cost together, against autograd through the whole model."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from surgery_helpers import statistics_source
from tiny_models import (
    CALIBRATION,
    decoder_layers,
    packed_tokens,
    settings,
    streamed,
    tiny_model,
    whole_boundaries,
    whole_losses,
)
from torch import Tensor
from transformers import PreTrainedModel

from layer_surgery.calibration.couplings import LEVELS, Couplings
from layer_surgery.calibration.statistics import Statistics, useful_ranks
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.scoring.fisher import greedy_order
from layer_surgery.walk.walk import Walk

LAYERS = 4


def collected(model: PreTrainedModel, scratch: Path, tokens: PackedTokens = CALIBRATION) -> Statistics:
    streaming = streamed(model)
    with Walk(streaming, tokens, settings(scratch)) as walk:
        return statistics_source(scratch).get(walk, useful_ranks(streaming, range(streaming.layer_count)))


def whole_changes(model: PreTrainedModel, statistics: Statistics, level: float, tokens: PackedTokens) -> Tensor:
    """Return `g_i . delta_i` [layers, valid tokens] with every gradient and change from the whole model."""
    boundaries: list[Tensor] = []

    def keep(_module: object, _arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states.retain_grad()
        boundaries.append(states)

    model = copy.deepcopy(model).requires_grad_(True)
    handles = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    whole_losses(model(tokens.token_ids, use_cache=False).logits, tokens).sum().backward()
    for handle in handles:
        handle.remove()
    original = whole_boundaries(model, tokens)
    rows = []
    for index, after in enumerate(boundaries):
        if level == 0:
            changed = original[index]
        else:
            operated = copy.deepcopy(model)
            layer = decoder_layers(operated)[index]
            parameters = sum(p.numel() for p in layer.parameters())
            ranks = statistics.layer_ranks(index, level, parameters)
            with torch.no_grad():
                for name, (left, right) in statistics.factors(index, ranks).items():
                    layer.get_submodule(name).weight.copy_(left @ right)
            changed = whole_boundaries(operated, tokens)[index + 1]
        assert after.grad is not None
        rows.append(((changed - original[index + 1]) * after.grad).sum(-1)[tokens.valid].detach())
    return torch.stack(rows)


@pytest.mark.parametrize("level", LEVELS)
def test_predicted_cost_is_half_the_mean_square_of_the_first_order_changes(tmp_path: Path, level: float) -> None:
    """`1/2 E[(sum over the chosen layers of g . delta)^2]`, for every set of layers, padding and masks in the data."""
    model = tiny_model(layers=LAYERS)
    statistics = collected(model, tmp_path)
    changes = whole_changes(model, statistics, level, CALIBRATION)
    for count in range(1, LAYERS + 1):
        for chosen in itertools.combinations(range(LAYERS), count):
            together = changes[list(chosen)].sum(dim=0)
            expected = 0.5 * float((together**2).sum()) / CALIBRATION.predicted_tokens
            assert statistics.couplings.cost(chosen, level) == pytest.approx(expected, rel=1e-8)


def test_layers_cost_together_what_they_do_not_cost_alone(tmp_path: Path) -> None:
    """Guards the test above: the terms between layers are not nothing."""
    couplings = collected(tiny_model(layers=LAYERS), tmp_path).couplings
    alone = sum(couplings.cost([index], 0.0) for index in range(LAYERS))
    assert abs(couplings.cost(range(LAYERS), 0.0) / alone - 1) > 0.05


@pytest.mark.parametrize("index", [0, 2, 3])
def test_removing_a_layer_that_does_nothing_costs_nothing_alone_and_with_others(tmp_path: Path, index: int) -> None:
    model = tiny_model(layers=LAYERS)
    with torch.no_grad():
        decoder_layers(model)[index].self_attn.o_proj.weight.zero_()
        decoder_layers(model)[index].mlp.down_proj.weight.zero_()
    couplings = collected(model, tmp_path).couplings
    for level in LEVELS:
        assert couplings.cost([index], level) == 0
        others = [k for k in range(LAYERS) if k != index]
        assert couplings.cost(others, level) == pytest.approx(couplings.cost(range(LAYERS), level), rel=1e-12)
        assert couplings.cost(others, level) > 0


def test_of_many_sequences_one_in_four_is_measured(tmp_path: Path) -> None:
    tokens = packed_tokens(33, 6, padding=True, excluded=0.3)
    model = tiny_model(layers=LAYERS)
    statistics = collected(model, tmp_path, tokens)
    chosen = torch.arange(33) % 4 == 0
    changes = whole_changes(model, statistics, 0.0, tokens)[:, chosen[:, None].expand(33, 6)[tokens.valid]]
    expected = changes @ changes.T / int(tokens.loss_mask[chosen].sum())
    assert statistics.couplings.matrices[0] == [pytest.approx(row.tolist(), rel=1e-8) for row in expected]


# Between the levels

EXAMPLE = Couplings([1, 4], [[[4.0, 1.0], [1.0, 2.0]], [[2.0, 0.5], [0.5, 1.0]], [[1.0, 0.25], [0.25, 0.5]]])


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.0, 4.0), (0.05, 3.0), (0.1, 2.0), (0.2, 1.5), (0.3, 1.0), (0.65, 0.5), (1.0, 0.0)]
)
def test_between_the_levels_costs_are_linear_and_all_kept_costs_nothing(keep: float, expected: float) -> None:
    assert EXAMPLE.between(keep)[1, 1] == pytest.approx(expected)
    assert EXAMPLE.cost([1], keep) == pytest.approx(expected / 2)


@pytest.mark.parametrize("keep", [1.0, 1.01, 1.9])
def test_factors_larger_than_the_weights_cost_nothing_and_not_less(keep: float) -> None:
    assert EXAMPLE.cost([1, 4], keep) == 0


def test_errors_scaled_layer_by_layer_scale_costs_by_their_products() -> None:
    scaled = EXAMPLE.scaled([0.5, 3.0])
    assert scaled.matrices[0] == [[1.0, 1.5], [1.5, 18.0]]
    assert scaled.layers == EXAMPLE.layers


# To disk and back


def test_couplings_survive_a_round_trip() -> None:
    assert Couplings.from_dict(EXAMPLE.to_dict()) == EXAMPLE


@pytest.mark.parametrize(
    "change",
    [
        {"levels": [0.0, 0.2, 0.3]},
        {"matrices": EXAMPLE.matrices[:2]},
        {"layers": [1, 4, 5]},
        {"matrices": [*EXAMPLE.matrices[:2], [[1.0, 2.0], [3.0]]]},
    ],
    ids=["levels", "too few", "layers", "ragged"],
)
def test_couplings_that_are_not_whole_are_refused(change: dict[str, list[object]]) -> None:
    with pytest.raises(ValueError, match="not what this release writes"):
        Couplings.from_dict(EXAMPLE.to_dict() | change)


# The order


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_order_adds_the_layer_that_makes_the_whole_cheapest(seed: int) -> None:
    half = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = (half @ half.T).tolist()
    couplings = Couplings([0, 1, 2, 3, 4], [matrix, matrix, matrix])
    expected: list[int] = []
    for _ in range(4):
        rest = [k for k in range(5) if k not in expected]
        expected.append(min(rest, key=lambda k: couplings.cost([*expected, k], 0.1)))
    assert greedy_order(couplings, 0.1, 4) == expected


def test_of_equal_layers_the_deeper_goes_first() -> None:
    matrix = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert greedy_order(Couplings([0, 1, 2], [matrix] * 3), 0.1, 3) == [2, 1, 0]


# Of attentions and MLPs


def test_parts_are_correlated_as_their_errors_are(tmp_path: Path) -> None:
    model = tiny_model(layers=LAYERS)
    with torch.no_grad():
        decoder_layers(model)[2].self_attn.o_proj.weight.zero_()  # half of nothing is nothing
    couplings = collected(model, tmp_path).couplings
    names = [f"{index} {part}" for index in range(LAYERS) for part in ("attention", "mlp")]
    assert sorted(couplings.parts) == sorted(names)
    rho = torch.tensor(couplings.correlations(names))
    assert torch.equal(rho, rho.T) and torch.equal(rho.diag(), torch.ones(len(names)))
    others = rho - torch.eye(len(names))
    assert float(others.abs().max()) < 1 and float(others.abs().max()) > 0.05
    assert not others[names.index("2 attention")].any()
    assert couplings.correlations(["0 attention", "0 experts"]) is None
    first, second = (names.index(name) for name in ("0 mlp", "3 mlp"))
    i, j = (couplings.parts.index(names[k]) for k in (first, second))
    k = couplings.part_matrix
    assert float(rho[first, second]) == pytest.approx(k[i][j] / (k[i][i] * k[j][j]) ** 0.5, rel=1e-5)
