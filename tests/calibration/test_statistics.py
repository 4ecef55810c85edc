"""Statistics of linears from one walk, against autograd through the whole model and plain decompositions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import LINEARS, statistics_source, walked_moments
from tiny_families import dtype_of
from tiny_models import (
    CALIBRATION,
    decoder_layers,
    largest_difference,
    packed_tokens,
    settings,
    streamed,
    tiny_checkpoint,
    tiny_model,
    whole_losses,
)
from torch import Tensor
from transformers import PreTrainedModel

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.calibration.statistics import Statistics, useful_rank, useful_ranks
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import DataError, NumericalError
from layer_surgery.linalg.decomposition import Decomposition
from layer_surgery.linalg.low_rank import shrunk
from layer_surgery.walk.walk import Walk


def collected(
    model: PreTrainedModel | Path,
    scratch: Path,
    *,
    tokens: PackedTokens = CALIBRATION,
    layers: dict[int, dict[str, int]] | None = None,
    batch_size: int = 2,
    dtype: torch.dtype = torch.float64,
    decomposition: Decomposition = "auto",
) -> Statistics:
    streaming = streamed(model, dtype=dtype)
    how = replace(settings(scratch, batch_size=batch_size), decomposition=decomposition)
    with Walk(streaming, tokens, how) as walk:
        wanted = layers or useful_ranks(streaming, range(streaming.layer_count))
        return statistics_source(scratch, dtype).get(walk, wanted)


def whole_moments(model: PreTrainedModel, tokens: PackedTokens, index: int, name: str) -> tuple[Tensor, Tensor]:
    """Return the damped A and B of one linear, by autograd through the whole model."""
    seen: dict[str, Tensor] = {}

    def hook(_module: Any, arguments: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.update(x=arguments[0].detach(), y=output)

    handle = decoder_layers(model.requires_grad_(True))[index].get_submodule(name).register_forward_hook(hook)
    whole_losses(model(tokens.token_ids, use_cache=False).logits, tokens).sum().backward()
    handle.remove()
    assert seen["y"].grad is not None
    x, g = seen["x"][tokens.valid], seen["y"].grad[tokens.valid]
    return shrunk(x.T @ x / len(x), len(x)), shrunk(g.T @ g / len(g), len(g))


# Spectra and components


@pytest.mark.parametrize(("index", "name"), [(0, "self_attn.k_proj"), (2, "mlp.down_proj"), (3, "mlp.gate_proj")])
def test_spectra_are_those_of_the_weight_between_the_roots_of_the_moments(
    tmp_path: Path, index: int, name: str
) -> None:
    statistics = collected(tiny_model(), tmp_path)
    model = tiny_model()
    inputs, outputs = whole_moments(model, CALIBRATION, index, name)
    weight = model.get_parameter(f"model.layers.{index}.{name}.weight").detach()
    expected = torch.linalg.svdvals(torch.linalg.cholesky(outputs).T @ weight @ torch.linalg.cholesky(inputs))
    found = torch.tensor(statistics.values[index][name], dtype=torch.float64)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7 * float(expected[0]))
    assert statistics.sizes[index][name] == tuple(weight.shape)


def test_a_linear_of_rank_r_is_reproduced_exactly_by_r_components(tmp_path: Path) -> None:
    model = tiny_model()
    linears = {"mlp.up_proj": 3, "self_attn.o_proj": 5, "mlp.down_proj": 4}
    weights = {name: decoder_layers(model)[1].get_submodule(name).weight for name in linears}
    with torch.no_grad():
        for name, rank in linears.items():
            u, s, vh = torch.linalg.svd(weights[name], full_matrices=False)
            weights[name].copy_(u[:, :rank] * s[:rank] @ vh[:rank])
    statistics = collected(model, tmp_path, layers={1: linears})
    for name, (left, right) in statistics.factors(1, linears).items():
        assert left.shape[1] == right.shape[0] == linears[name]
        assert largest_difference(left @ right, weights[name]) < 1e-9
    assert statistics.cost(1, linears) < 1e-12 * statistics.cost(1, dict.fromkeys(linears, 0))


def test_only_the_linears_asked_for_are_there(tmp_path: Path) -> None:
    statistics = collected(tiny_model(), tmp_path, layers={1: {"mlp.up_proj": 4}, 3: {"self_attn.q_proj": 2}})
    assert statistics.ranks == {1: {"mlp.up_proj": 4}, 3: {"self_attn.q_proj": 2}}
    assert statistics.covers({1: {"mlp.up_proj": 4}}) and statistics.covers({3: {"self_attn.q_proj": 1}})
    assert not statistics.covers({1: {"mlp.up_proj": 5}})
    assert not statistics.covers({1: {"mlp.down_proj": 1}})
    assert not statistics.covers({0: {"mlp.up_proj": 1}})


def test_statistics_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    tokens = packed_tokens(8, 10, padding=True, excluded=0.2)
    one, three, eight = (collected(tiny_model(), tmp_path, tokens=tokens, batch_size=size) for size in (1, 3, 8))
    for other in (three, eight):
        for index, names in one.values.items():
            for name, values in names.items():
                assert other.values[index][name] == pytest.approx(values, rel=1e-8, abs=1e-8 * values[0])
        for found, expected in zip(other.couplings.matrices, one.couplings.matrices, strict=True):
            assert found == [pytest.approx(row, rel=1e-8, abs=1e-10) for row in expected]


def test_padding_never_enters(tmp_path: Path) -> None:
    poisoned = replace(CALIBRATION, token_ids=torch.where(CALIBRATION.valid, CALIBRATION.token_ids, 7))
    assert not torch.equal(poisoned.token_ids, CALIBRATION.token_ids)
    clean, other = (collected(tiny_model(), tmp_path, tokens=tokens) for tokens in (CALIBRATION, poisoned))
    assert other.values == clean.values
    assert other.couplings == clean.couplings


# Sums


def test_moments_merged_from_halves_equal_the_whole(tmp_path: Path) -> None:
    whole = walked_moments(CALIBRATION, tmp_path)
    halves = []
    for rows in (slice(0, 2), slice(2, 5)):
        parts = {name: getattr(CALIBRATION, name)[rows] for name in ("token_ids", "loss_mask", "valid")}
        halves.append(walked_moments(replace(CALIBRATION, **parts), tmp_path))
    for index, expected in whole.items():
        first, second = (half[index] for half in halves)
        assert first.tokens + second.tokens == expected.tokens == int(CALIBRATION.valid.sum())
        for kind in ("inputs", "outputs"):
            sums = getattr(expected, kind)
            for name, total in sums.items():
                assert largest_difference(total, total.T) < 1e-14
                assert largest_difference(getattr(first, kind)[name] + getattr(second, kind)[name], total) < 1e-12


# Ranks


def test_the_useful_rank_is_the_largest_that_saves_parameters() -> None:
    for out, in_ in itertools.product((1, 5, 12, 32), repeat=2):
        rank = useful_rank((out, in_))
        assert rank == 1 or rank * (out + in_) <= out * in_
        assert (rank + 1) * (out + in_) > out * in_


def test_an_output_projection_is_worth_what_its_inputs_still_carry(tmp_path: Path) -> None:
    """Where the budget forces the inputs down, less goes to the projection that reads them, to the same total."""
    linears = {"mlp.gate_proj": 17, "mlp.up_proj": 17, "mlp.down_proj": 17}
    statistics = collected(tiny_model(), tmp_path, layers={1: linears})
    statistics.values[1]["mlp.down_proj"] = [2.0] * 32
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        statistics.values[1][name] = [1.0] * 32
    each = 32 + 40
    statistics.fed_by = {}
    alone = statistics.best_ranks({1: linears}, 20 * each)[1]
    assert alone == {"mlp.gate_proj": 2, "mlp.up_proj": 1, "mlp.down_proj": 17}
    statistics.fed_by = {"mlp.down_proj": ("mlp.gate_proj", "mlp.up_proj")}
    fed = statistics.best_ranks({1: linears}, 20 * each)[1]
    assert sum(fed.values()) == sum(alone.values())
    assert fed["mlp.down_proj"] < alone["mlp.down_proj"]


def test_best_ranks_spend_the_budget_where_it_is_worth_most(tmp_path: Path) -> None:
    """By brute force over all ranks: no choice of the same cost leaves less out, up to one component."""
    linears = {"mlp.up_proj": 4, "mlp.down_proj": 4}
    statistics = collected(tiny_model(), tmp_path, layers={1: linears, 2: linears})
    statistics.fed_by = {}  # each linear by itself
    each = 32 + 40
    for budget in range(4 * each, 17 * each, 50):
        chosen = statistics.best_ranks({1: linears, 2: linears}, budget)
        ranks = [chosen[index][name] for index in (1, 2) for name in linears]
        assert sum(ranks) == min(16, budget // each)
        feasible = [r for r in itertools.product(range(1, 5), repeat=4) if sum(r) == sum(ranks)]
        costs = {r: statistics.cost(1, dict(zip(linears, r[:2], strict=True))) for r in feasible}
        costs = {r: cost + statistics.cost(2, dict(zip(linears, r[2:], strict=True))) for r, cost in costs.items()}
        assert costs[tuple(ranks)] == pytest.approx(min(costs.values()), rel=1e-9)


# Computed again only where it must be


def test_what_is_there_is_not_computed_again_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[list[int]] = []
    backpropagate = Walk.backpropagate
    monkeypatch.setattr(
        Walk,
        "backpropagate",
        lambda self, *args, **kwargs: (walks.append(sorted(kwargs["watch"])), backpropagate(self, *args, **kwargs))[1],
    )
    model = streamed(tiny_model())
    with Walk(model, CALIBRATION, settings(tmp_path)) as walk:
        source = statistics_source(tmp_path)
        first = source.get(walk, {1: {"mlp.up_proj": 4}})
        assert source.get(walk, {1: {"mlp.up_proj": 2}}) is first
        second = source.get(walk, {2: {"mlp.up_proj": 3}})
        assert second.covers({1: {"mlp.up_proj": 4}, 2: {"mlp.up_proj": 3}})
        assert source.get(walk, {1: {"mlp.up_proj": 4}}) is second
    assert walks == [[1], [1, 2]]
    again, once = (part.factors(1, {"mlp.up_proj": 4})["mlp.up_proj"] for part in (second, first))
    assert largest_difference(again.left @ again.right, once.left @ once.right) < 1e-12


def test_nothing_asked_for_is_no_walk(tmp_path: Path) -> None:
    with Walk(streamed(tiny_model()), packed_tokens(1, 2), settings(tmp_path)) as walk:
        assert StatisticsSource(tmp_path, torch.float64).get(walk, {}).values == {}


# Refusals


def test_too_few_tokens_are_refused_with_the_number_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"as the model is wide, 32, but there are 30; give --samples 4 or more"):
        collected(tiny_model(), tmp_path, tokens=packed_tokens(3, 10))
    assert collected(tiny_model(), tmp_path, tokens=packed_tokens(4, 8)).values


def test_a_moment_that_is_not_finite_names_layer_and_linear(tmp_path: Path) -> None:
    """The inputs of one linear are finite, and their squares are not in float32; the loss is fine."""
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        mlp = decoder_layers(model)[2].mlp
        mlp.up_proj.weight.mul_(1e22)
        mlp.down_proj.weight.mul_(1e-22)
        logits = model(CALIBRATION.token_ids, use_cache=False).logits
    assert logits.isfinite().all()
    with pytest.raises(NumericalError, match=r"'mlp\.down_proj' in layer 2 is not finite; try --dtype float32"):
        collected(model, tmp_path, dtype=torch.float32)


def test_statistics_in_bfloat16_are_near_those_in_float32(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tiny_model(dtype=torch.bfloat16))
    tokens = packed_tokens(12, 12)
    short, long = (collected(path, tmp_path, tokens=tokens, dtype=t) for t in (torch.bfloat16, torch.float32))
    for name in LINEARS:
        a, b = (torch.tensor(s.values[1][name]) for s in (short, long))
        assert largest_difference(a / b[0], b / b[0]) < 0.1


# Wide matrices


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_leading_way_gives_what_the_exact_way_does(tmp_path: Path, model_type: str) -> None:
    """Costs of linears, channels, experts and couplings; that it was another way shows in the last digits."""
    ways: tuple[Decomposition, ...] = ("exact", "leading")
    found = {}
    for way in ways:
        (tmp_path / way).mkdir()
        model = tiny_model(model_type)
        found[way] = collected(model, tmp_path / way, dtype=dtype_of(model_type), decomposition=way)
    exact, leading = found["exact"], found["leading"]
    for index, ranks in exact.ranks.items():
        for name, most in ranks.items():
            assert len(leading.values[index][name]) == len(exact.values[index][name])
            for rank in (0, most // 2, most):
                expected = exact.cost(index, {name: rank})
                assert leading.cost(index, {name: rank}) == pytest.approx(expected, rel=1e-2, abs=1e-9)
    orders = [
        *((leading.channels[i], exact.channels[i]) for i in exact.channels),
        *(pair for i in exact.experts for pair in zip(leading.experts[i], exact.experts[i], strict=True)),
    ]
    assert orders
    for one, other in orders:
        assert one.costs() == pytest.approx(other.costs(), rel=1e-2, abs=1e-9)
    for one_matrix, other_matrix in zip(leading.couplings.matrices, exact.couplings.matrices, strict=True):
        assert largest_difference(torch.tensor(one_matrix), torch.tensor(other_matrix)) < 1e-3
    assert leading.values != exact.values
