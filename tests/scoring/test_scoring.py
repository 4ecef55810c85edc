"""Scorers against naive implementations on the whole model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from surgery_helpers import statistics_source
from tiny_models import (
    changes,
    decoder_layers,
    hooks_on,
    packed_tokens,
    padded_on_the_right,
    settings,
    snapshot,
    streamed,
    tiny_checkpoint,
    tiny_model,
    whole_boundaries,
    whole_gradients,
    whole_logits,
    whole_losses,
    without_layers,
)
from transformers import PreTrainedModel

from layer_surgery.calibration.statistics import useful_ranks
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import UserError
from layer_surgery.records import LayerScores
from layer_surgery.registry import Registry
from layer_surgery.scoring import SCORERS, ScorerEntry, ScoringContext
from layer_surgery.scoring.context import Ranking
from layer_surgery.surgeon import METHODS
from layer_surgery.walk.walk import Walk

TOKENS = packed_tokens(5, 11, padding=True, excluded=0.2)
DATA_SCORERS = ["block_influence", "angular", "taylor", "perplexity", "fisher"]


def score(
    name: str,
    model: PreTrainedModel | Path,
    scratch: Path,
    *,
    tokens: PackedTokens = TOKENS,
    count: int | None = None,
    seed: int = 0,
    batch_size: int = 2,
    on_disk: bool = False,
    keep: float = 0.1,
    refit: bool = True,
) -> LayerScores:
    where = settings(scratch, batch_size=batch_size, boundary_memory_bytes=0 if on_disk else 1 << 29)
    with Walk(streamed(model, resident_bytes=0 if on_disk else 1 << 29), tokens, where) as walk:
        context = ScoringContext(
            walk=walk, count=count, seed=seed, statistics=statistics_source(scratch), keep=keep, refit=refit
        )
        return SCORERS[name].scores(context)


def mean_loss(model: PreTrainedModel, tokens: PackedTokens = TOKENS) -> float:
    sums = whole_losses(whole_logits(model, tokens), tokens)
    return float(sums.sum() / tokens.loss_mask.sum())


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


# Against naive implementations


def test_block_influence_equals_a_loop_over_tokens(tmp_path: Path) -> None:
    model = tiny_model(layers=5)
    states = whole_boundaries(model, TOKENS)
    positions = TOKENS.valid.nonzero().tolist()
    expected = [
        1 - sum(cosine(states[k][n, t], states[k + 1][n, t]) for n, t in positions) / len(positions) for k in range(5)
    ]
    scores = score("block_influence", model, tmp_path)
    assert scores.values == pytest.approx(expected, abs=1e-12)
    assert scores.removal_order == sorted(range(5), key=lambda k: expected[k])
    assert scores.tokens == len(positions)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_angular_distance_equals_a_loop_over_sequences_and_blocks(tmp_path: Path, size: int) -> None:
    model = tiny_model(layers=5)
    states = whole_boundaries(model, TOKENS)
    ends = [int(row.nonzero().max()) for row in TOKENS.valid]

    def distance(first: int, last: int) -> float:
        angles = [math.acos(cosine(states[first][n, t], states[last][n, t])) / math.pi for n, t in enumerate(ends)]
        return sum(angles) / len(angles)

    start = min(range(5 - size + 1), key=lambda s: distance(s, s + size))
    scores = score("angular", model, tmp_path, count=size)
    assert scores.values == pytest.approx([distance(k, k + 1) for k in range(5)], abs=1e-9)
    assert scores.removal_order == list(range(start, start + size))


def test_angular_distance_of_a_batch_does_not_depend_on_its_padding(tmp_path: Path) -> None:
    tokens = packed_tokens(3, 8)
    padded = padded_on_the_right(tokens, 5)
    model = tiny_model()
    plain, with_padding = (score("angular", model, tmp_path, tokens=t, count=2) for t in (tokens, padded))
    assert with_padding.values == pytest.approx(plain.values, abs=1e-12)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "starcoder2"])
def test_taylor_equals_whole_model_autograd(tmp_path: Path, model_type: str, on_disk: bool) -> None:
    model = tiny_model(model_type)
    gradients = whole_gradients(model, TOKENS)
    weights = dict(model.named_parameters())
    expected = [
        sum(
            float((weights[name].detach() * gradient).abs().sum())
            for name, gradient in gradients.items()
            if name.startswith(f"model.layers.{k}.") and gradient.dim() == 2
        )
        for k in range(4)
    ]
    scores = score("taylor", tiny_checkpoint(tmp_path, model), tmp_path, on_disk=on_disk)
    assert scores.values == pytest.approx(expected, rel=1e-10)
    assert scores.removal_order == sorted(range(4), key=lambda k: expected[k])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_greedy_perplexity_order_equals_brute_force(tmp_path: Path, count: int) -> None:
    model = tiny_model(layers=5, seed=0)
    removed: list[int] = []
    for _ in range(count):
        candidates = [k for k in range(5) if k not in removed]
        removed.append(min(candidates, key=lambda k: mean_loss(without_layers(model, [*removed, k]))))
    assert score("perplexity", model, tmp_path, count=count).removal_order == removed


def test_greedy_perplexity_brute_force_is_not_just_the_first_rounds_order(tmp_path: Path) -> None:
    """Guards the test above: on this model, ranking once and greedy removal choose different layers."""
    model = tiny_model(layers=5, seed=0)
    once = score("perplexity", model, tmp_path).removal_order
    assert score("perplexity", model, tmp_path, count=3).removal_order != once[:3]


def test_perplexity_values_are_the_rise_of_the_loss_without_each_layer_and_rank_them(tmp_path: Path) -> None:
    model = tiny_model(layers=5)
    whole = mean_loss(model)
    expected = [mean_loss(without_layers(model, [k])) - whole for k in range(5)]
    for count in (2, None):
        scores = score("perplexity", model, tmp_path, count=count, on_disk=True)
        assert scores.values == pytest.approx(expected, abs=1e-9)
    assert scores.removal_order == sorted(range(5), key=lambda k: scores.values[k])


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("keep", [0.1, 0.2])
def test_fisher_values_are_the_costs_alone_and_the_order_is_by_costs_together(
    tmp_path: Path, keep: float, refit: bool
) -> None:
    """With a refit to follow, layers far in front of the end have less of their error left."""
    model = tiny_model(layers=5)
    streaming = streamed(model)
    with Walk(streaming, TOKENS, settings(tmp_path)) as walk:
        couplings = statistics_source(tmp_path).get(walk, useful_ranks(streaming, range(5))).couplings
    if refit:
        couplings = couplings.scaled([2 / 3, 3 / 4, 5 / 6, 11 / 12, 1.0])
    expected: list[int] = []
    while len(expected) < 3:
        rest = [k for k in range(5) if k not in expected]
        expected.append(min(rest, key=lambda k: couplings.cost([*expected, k], keep)))
    scores = score("fisher", model, tmp_path, count=3, keep=keep, refit=refit)
    assert scores.values == pytest.approx([couplings.cost([k], keep) for k in range(5)], rel=1e-9)
    assert scores.removal_order == expected


# Layers that do nothing


def with_identity_layer(index: int, layers: int = 5) -> PreTrainedModel:
    model = tiny_model(layers=layers)
    with torch.no_grad():
        decoder_layers(model)[index].self_attn.o_proj.weight.zero_()
        decoder_layers(model)[index].mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("index", [0, 2, 4])
@pytest.mark.parametrize("scorer", ["block_influence", "angular", "fisher", "perplexity"])
def test_an_identity_layer_is_worth_nothing_and_goes_first(tmp_path: Path, scorer: str, index: int) -> None:
    scores = score(scorer, with_identity_layer(index), tmp_path, count=1)
    assert scores.values[index] == pytest.approx(0, abs=1e-12 if scorer == "perplexity" else 1e-7)
    if scorer != "perplexity":  # other layers may do harm
        assert min(value for k, value in enumerate(scores.values) if k != index) > 0.01
        assert scores.removal_order[0] == index


# Batches


@pytest.mark.parametrize("scorer", DATA_SCORERS)
def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path, scorer: str) -> None:
    model, tokens = tiny_model(), packed_tokens(8, 10, padding=True, excluded=0.2)
    results = [score(scorer, model, tmp_path, tokens=tokens, count=2, batch_size=size) for size in (1, 3, 8)]
    for one, other in itertools.pairwise(results):
        assert one.values == pytest.approx(other.values, rel=1e-10, abs=1e-10)
        assert one.removal_order == other.removal_order


# Baselines


def test_last_removes_from_the_end_and_the_final_layer_last_of_all(tmp_path: Path) -> None:
    assert score("last", tiny_model(layers=5), tmp_path).removal_order == [3, 2, 1, 0, 4]


def test_the_seed_decides_the_random_order(tmp_path: Path) -> None:
    model = tiny_model(layers=8)
    first, second, third, again = (score("random", model, tmp_path, seed=seed) for seed in (0, 1, 2, 0))
    orders = {tuple(scores.removal_order) for scores in (first, second, third)}
    assert again == first and len(orders) == 3
    assert all(sorted(order) == list(range(8)) for order in orders)


def test_random_scores_leave_the_global_generator_alone(tmp_path: Path) -> None:
    model = tiny_model(layers=3)
    before = torch.random.get_rng_state()
    score("random", model, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


# Registry


def test_an_unknown_scorer_is_answered_with_the_nearest_or_all() -> None:
    with pytest.raises(UserError, match=r"unknown scorer 'block_inflence'.*Did you mean 'block_influence'\?"):
        SCORERS["block_inflence"]
    with pytest.raises(UserError, match=r"Known: angular, block_influence, fisher, last, perplexity"):
        SCORERS["zzz"]


def test_a_registry_refuses_a_name_that_is_taken_or_not_listed() -> None:
    registry = Registry("thing", ScorerEntry, listed=("one",))
    ranking = Ranking("things", [1.0])
    registry.add("one")(lambda _context: ranking)
    with pytest.raises(ValueError, match="thing 'one' is registered already"):
        registry.add("one")(lambda _context: Ranking("others", []))
    with pytest.raises(ValueError, match="thing 'two' is not listed"):
        registry.add("two")(lambda _context: ranking)
    assert registry.names == ["one"] and registry["one"].rank(None) is ranking


def test_needing_boundaries_is_needing_data() -> None:
    assert all(method.needs_data for method in METHODS if method.needs_boundaries)
    assert any(method.needs_boundaries for method in METHODS)


def test_every_scorer_that_looks_at_data_says_so_and_names_its_paper(tmp_path: Path) -> None:
    assert sorted(entry.name for entry in SCORERS if entry.needs_data) == sorted(DATA_SCORERS)
    assert all(entry.source.startswith("https://arxiv.org/abs/") for entry in SCORERS if entry.needs_data)


# Nothing left behind


@pytest.mark.parametrize("scorer", [*DATA_SCORERS, "random", "last"])
def test_scoring_leaves_a_users_model_untouched(tmp_path: Path, scorer: str) -> None:
    model = tiny_model().train()
    decoder_layers(model)[1].register_forward_hook(lambda *_: None)
    model.get_parameter("model.layers.0.mlp.up_proj.weight").register_hook(lambda _gradient: None)
    decoder_layers(model)[3].requires_grad_(False)
    before = snapshot(model)
    score(scorer, model, tmp_path, count=2)
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("scorer", DATA_SCORERS)
def test_scoring_leaves_no_hook_and_no_boundary_file(tmp_path: Path, scorer: str) -> None:
    model, statistics = streamed(tiny_model()), statistics_source(tmp_path)
    before = list(tmp_path.iterdir())
    with Walk(model, TOKENS, settings(tmp_path, boundary_memory_bytes=0)) as walk:
        context = ScoringContext(walk=walk, count=2, seed=0, statistics=statistics, keep=0.1)
        SCORERS[scorer].scores(context)
        assert hooks_on(model.model) == []
    assert list(tmp_path.iterdir()) == before
