"""The parts of a sweep that run no model: fronts, conditions, its identity, and what scorers depend on."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import saved_model
from tiny_models import packed_tokens, settings, streamed, tiny_checkpoint

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.calibration.statistics import useful_ranks
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.config import EvaluationConfig, SweepConfig
from layer_surgery.config.declaring import about_of, fields_of
from layer_surgery.errors import OutputError, UserError
from layer_surgery.records import Comparison, EvaluationResult, KlDivergence, Perplexity, Top1Agreement
from layer_surgery.records.sweep import SweepPoint
from layer_surgery.runs.session import open_session
from layer_surgery.runs.sweep.condition import find_best, parse_condition
from layer_surgery.runs.sweep.identity import check_same, sweep_identity
from layer_surgery.runs.sweep.pareto import with_fronts
from layer_surgery.scoring import SCORERS, ScoringContext
from layer_surgery.walk.walk import Walk


def point(number: int, parameters: int | None, ratio: float | None, **found: Any) -> SweepPoint:
    settings = {"target_layers": number, "keep": 0.0, "method": "remove", "scorer": "last", "refit": False}
    return SweepPoint(**settings, **{"status": "done", "parameters": parameters, "perplexity_ratio": ratio} | found)


# Fronts


def test_the_front_has_what_no_other_point_beats() -> None:
    points = [
        point(1, 10, 1.5),  # the smallest
        point(2, 20, 1.2),
        point(3, 20, 1.3),  # as large as the second and worse
        point(4, 30, 1.2),  # as good as the second and larger
        point(5, 20, 1.2),  # the same as the second
        point(6, 40, 1.1),
        point(7, 50, 1.4),
        point(8, 5, None),
        point(9, 5, 1.0, status="failed"),
    ]
    assert [p.target_layers for p in with_fronts(points) if p.fronts] == [1, 2, 5, 6]


def test_fronts_equal_the_definition() -> None:
    draw = random.Random(0)
    points = [point(i, draw.randint(1, 6), draw.randint(1, 6) / 4) for i in range(20)]
    found = {p.target_layers for p in with_fronts(points) if "parameters" in p.fronts}
    beaten = {
        p.target_layers
        for p, q in itertools.product(points, points)
        if (q.parameters or 0) <= (p.parameters or 0)
        and (q.perplexity_ratio or 0) <= (p.perplexity_ratio or 0)
        and (q.parameters, q.perplexity_ratio) != (p.parameters, p.perplexity_ratio)
    }
    assert found == set(range(20)) - beaten


def test_on_the_front_of_speed_faster_is_better_and_the_original_is_a_rival() -> None:
    points = [
        point(1, 10, 1.2, decode_speed=1.5, prefill_speed=0.9),
        point(2, 20, 1.3, decode_speed=1.4),
        point(3, 30, 1.1, decode_speed=0.9),  # slower than the original and worse
        point(4, 40, 0.9, decode_speed=0.9),
    ]
    both = ["parameters", "decode_speed"]
    assert [p.fronts for p in with_fronts(points)] == [both, [], ["parameters"], both]


# Conditions


def measured(number: int, parameters: int, **values: float) -> SweepPoint:
    perplexity = values.get("perplexity", 20.0)
    texts = {"a": perplexity / 2, "b": perplexity * 2}  # their geometric mean is `perplexity`
    found = {
        name: Perplexity(value=value, stderr=None, tokens=1, windows=1, sequence_length=1, data_sha256="")
        for name, value in texts.items()
    }
    costs = {"kv_cache_bytes_per_token": None, "flops_per_token": None, "flops_context_tokens": 1}
    result = EvaluationResult(layers=1, parameters=parameters, size_bytes=1, perplexity=found, **costs)
    kl, top1 = values.get("kl", 0.1), values.get("top1", 0.8)
    comparison = Comparison(
        kl_divergence={
            name: KlDivergence(mean=kl + step, stderr=None, p99_9=1.0, maximum=1.0, tokens=1)
            for name, step in (("a", -0.05), ("b", 0.05))
        },
        top1_agreement={name: Top1Agreement(value=top1, stderr=None, tokens=1) for name in texts},
    )
    return point(number, parameters, perplexity / 10, result=result, comparison=comparison)


POINTS = [
    measured(1, 40, perplexity=10.5, kl=0.06, top1=0.95),
    measured(2, 30, perplexity=11.0, kl=0.10, top1=0.90),
    measured(3, 20, perplexity=14.0, kl=0.30, top1=0.70),
    measured(4, 20, perplexity=13.0, kl=0.40, top1=0.60),
]


@pytest.mark.parametrize(
    ("condition", "best"),
    [
        ("perplexity<=1.1x", 2),
        ("perplexity<1.1x", 1),
        (" perplexity <= 1.45 x ", 4),  # of two of the same size the better
        ("perplexity<=11.0000001", 2),
        ("perplexity<=1.06e1", 1),
        ("kl_divergence<=0.2", 2),
        ("kl-divergence<=0.35", 3),
        ("top1_agreement>=0.9", 2),
        ("top1_agreement>0.9", 1),
    ],
)
def test_the_best_is_the_smallest_that_satisfies(condition: str, best: int) -> None:
    found = find_best(parse_condition(condition, EvaluationConfig()), POINTS)
    assert found.point is not None and found.point.target_layers == best and found.nearest is None


@pytest.mark.parametrize(
    ("condition", "nearest", "value"),
    [("perplexity<=1x", 1, 1.05), ("kl_divergence<=0.01", 1, 0.06), ("top1_agreement>=0.99", 1, 0.95)],
)
def test_if_none_satisfies_the_nearest_is_told(condition: str, nearest: int, value: float) -> None:
    found = find_best(parse_condition(condition, EvaluationConfig()), POINTS[::-1])
    assert found.point is None and found.nearest is not None and found.nearest.target_layers == nearest
    assert found.value == pytest.approx(value)


def test_points_that_failed_are_never_the_best() -> None:
    found = find_best(parse_condition("perplexity<=9x", EvaluationConfig()), [point(1, 1, 1.0, status="failed")])
    assert found.point is None and found.nearest is None


def test_a_condition_without_a_number_is_refused() -> None:
    for text in (
        "",
        "perplexity",
        "perplexity<=",
        "perplexity<=-",
        "perplexity~1",
        "1.1x",
        "perplexity<=1.1x and more",
    ):
        with pytest.raises(UserError, match="give a quantity and a bound"):
            parse_condition(text, EvaluationConfig())


# Options


def test_every_option_of_a_sweep_is_in_its_identity_or_is_known_not_to_decide_results(tmp_path: Path) -> None:
    """Who adds an option must say which: with another value a sweep would go on, and mix its points with others."""
    config = SweepConfig(target_layers=2, tasks="bundled", speed=True)
    tokens = packed_tokens(2, 5)
    with open_session(saved_model(tmp_path / "model"), config) as session:
        identity = sweep_identity(session, config, "", tokens, [tokens])
    named = {word for key in identity for word in key.split() if word.startswith("--")}
    options = {about_of(field).option(field.name) for field in fields_of(SweepConfig)}
    assert named <= options
    assert options - named == {
        *("--target-layers", "--keep", "--method", "--scorer", "--refit"),  # name the points
        *("--head", "--pooling"),  # in the hash of the model
        *("--task-path", "--num-fewshot", "--limit"),  # under --tasks
        *("--speed-batch-sizes", "--speed-lengths", "--speed-new-tokens", "--speed-repeats"),  # under --speed
        *("--text-column", "--tokenizer", "--trust-remote-code"),  # decide the model's and the tokens' hashes
        *("--output", "--overwrite", "--best", "--continuations", "--prompt"),  # of the best, or of files
        *("--batch-size", "--memory-limit", "--resident-bytes", "--boundary-bytes", "--cache", "--scratch"),
        *("--ui", "--command"),
    }


# Scorers and statistics


@pytest.mark.parametrize("scorer", SCORERS.names)
def test_scorers_look_at_nothing_that_they_do_not_depend_on(scorer: str, tmp_path: Path) -> None:
    """A sweep gives one ranking to all points for which `depends_on` is the same."""
    seen: set[str] = set()

    class Watched(ScoringContext):
        def __getattribute__(self, name: str) -> Any:
            seen.add(name)
            return super().__getattribute__(name)

    entry = SCORERS[scorer]
    with Walk(streamed(tiny_checkpoint(tmp_path)), packed_tokens(8, 12), settings(tmp_path)) as walk:
        (tmp_path / "statistics").mkdir()
        statistics = StatisticsSource(tmp_path / "statistics", walk.model.dtype)
        entry.scores(Watched(walk=walk, count=2, seed=0, statistics=statistics, keep=0.2))
    assert "walk" in seen or "seed" in seen
    assert seen & {"count", "keep", "refit"} == set(entry.depends_on)


def test_branches_of_statistics_share_the_walk_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    backpropagate = Walk.backpropagate

    def counted(self: Walk, *args: Any, **kwargs: Any) -> None:
        walks.append(min(kwargs["watch"]))
        backpropagate(self, *args, **kwargs)

    monkeypatch.setattr(Walk, "backpropagate", counted)
    folders = [tmp_path / name for name in ("trunk", "first", "second")]
    for folder in folders:
        folder.mkdir()
    with Walk(streamed(tiny_checkpoint(tmp_path)), packed_tokens(8, 12), settings(tmp_path)) as walk:
        trunk = StatisticsSource(folders[0], walk.model.dtype)
        first, second = (trunk.branch(folder) for folder in folders[1:])
        usual = useful_ranks(walk.model, [2])
        more = {2: {name: rank + 1 for name, rank in usual[2].items()}}
        assert first.get(walk, usual) is trunk.get(walk, usual)
        assert walks == [0]
        larger = first.get(walk, more)
        assert larger.covers(more) and walks == [0, 0]
        assert isinstance(larger.components, FactorStore) and larger.components.directory.parent == folders[1]
        assert not second.get(walk, usual).covers(more) and walks == [0, 0]


def test_what_an_older_release_has_not_written_down_is_said_plainly(tmp_path: Path) -> None:
    now = {"--seed": 0, "the code of layer-surgery (sha256)": "a" * 64}
    with pytest.raises(OutputError) as refused:
        check_same(tmp_path, {"--seed": 0, "--old": 1}, now)
    message = str(refused.value)
    assert "the code of layer-surgery (sha256) is aaaaaaaaaaaa..., and what it was is not written down" in message
    assert "--old was 1, which this release does not know" in message and "None" not in message
