"""What a healing will take, said before it: nothing is trained or written, and what cannot fit is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
import torch
from large_sizes import llama_7b
from tiny_checkpoints import CommandLine, listing, model_with_vocabulary, saved_model, strict_json, text_file
from tiny_embedders import dense, saved_embedder
from tiny_encoders import labelled_file, saved_encoder
from torch import nn

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.objective import Problem
from layer_surgery.errors import UserError
from layer_surgery.records.foresight import Foresight
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.foresight import healing as foresight
from layer_surgery.runs.foresight.healing_case import HealingCase, Numbers
from layer_surgery.runs.foresight.healing_stages import ForeseenHealing
from layer_surgery.runs.foresight.process import Process
from layer_surgery.runs.foresight.training_probe import kept_for_gradients
from layer_surgery.runs.healing import stage
from layer_surgery.runs.healing.asking import Asking
from layer_surgery.runs.session import Session

QUICK: dict[str, Any] = {"sequence_length": 16, "eval_windows": 8, "continuations": 0}
GB = 10**9


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("words") / "words.txt", lines=150)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """A model with two smaller layers, beside its original."""
    original = saved_model(tmp_path_factory.mktemp("original") / "MODEL", model=model_with_vocabulary())
    output = original.parent / "smaller"
    layer_surgery.compress(
        original, output, layers=[1, 2], keep=0.2, method="svd", calibration=str(words), samples=16, **QUICK
    )
    return output


@pytest.fixture
def options(words: Path) -> dict[str, Any]:
    return QUICK | {"data": str(words), "eval_data": str(words), "tokens": 1500, "general": 0.0}


def names(found: Foresight) -> list[str]:
    return [each.name for each in found.stages]


def test_nothing_is_trained_or_written(
    result: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run has begun the work")

    for owner, name in ((Evaluator, "measure"), (Asking, "ask"), (stage, "train"), (stage, "probe")):
        monkeypatch.setattr(owner, name, forbidden)
    folders = {"teacher_cache": tmp_path / "cache", "checkpoints": tmp_path / "checkpoints"}
    found = layer_surgery.foresee_heal(result, tmp_path / "output", stages=("local", "global"), **folders, **options)
    between = ["heal_local", "heal_probe", "heal_ask", "heal_train"]
    assert names(found) == ["evaluate_before", "evaluate_unhealed", *between, "evaluate_after", "save"]
    assert all(each.seconds is not None and each.seconds > 0 for each in found.stages)
    assert all(sum(each.parts.values()) == each.memory_bytes for each in found.stages)
    assert [each.option for each in found.kept] == ["--teacher-cache", "--checkpoints"]
    assert found.output_bytes > 0 and all(each.bytes > 0 for each in found.kept)
    assert listing(tmp_path) == {}


def test_each_way_of_training_has_its_memory(result: Path, options: dict[str, Any]) -> None:
    students = {}
    for train in ("all", "factors", "operated", "last", "head", "lora"):
        found = layer_surgery.foresee_heal(result, train=train, lora_rank=1, learning_rate=1e-4, **options)
        assert names(found)[2:-1] == ["heal_ask", "heal_train"]  # with a learning rate none is tried
        students[train] = next(each for each in found.stages if each.name == "heal_train").parts["the student"]
    trained = layer_surgery.heal(result, no_save=True, train="lora", lora_rank=1, learning_rate=1e-4, **options)
    assert trained.healing is not None
    # Weights of four bytes, and twelve more for each that is trained: the adapters, and all norms.
    own = open_checkpoint(result).parameters
    adapters = trained.healing.trained_parameters - 9 * 32  # four layers with two norms, and the last
    assert students["lora"] == 4 * (own + adapters) + 12 * trained.healing.trained_parameters
    assert all(students[train] < students["all"] == 16 * own for train in students if train != "all")


def test_what_the_original_has_said_is_not_asked_again(result: Path, options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"teacher_cache": tmp_path / "cache", "learning_rate": 1e-3}
    before = layer_surgery.foresee_heal(result, **options)
    report = layer_surgery.heal(result, no_save=True, **options | {"eval_data": None})
    assert report.healing is not None
    after = layer_surgery.foresee_heal(result, **options)
    assert "heal_ask" in names(before) and "heal_ask" not in names(after)
    # A cache of other data does not help.
    assert "heal_ask" in names(layer_surgery.foresee_heal(result, **options | {"seed": 1}))
    written = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("shard-*"))
    assert 0.5 * written <= before.kept[0].bytes <= 2 * written


def test_steps_and_names_are_those_of_the_run(result: Path, options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"checkpoints": tmp_path / "checkpoints"}
    found = layer_surgery.foresee_heal(result, **options)
    report = layer_surgery.heal(result, no_save=True, **options)
    assert report.healing is not None
    training = next(each for each in found.stages if each.name == "heal_train")
    # Sixteen windows of sixteen tokens a step; the last window of the text may be shorter.
    assert training.title.startswith("training (all), 6 steps with 1,5")
    assert report.healing.steps <= 6
    assert {each.name for each in found.stages} <= set(report.timings)
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*") if file.is_file())
    assert 0.5 * written <= found.kept[0].bytes <= 2 * written
    # Going on from a checkpoint of another training is refused here as there.
    kept = next((tmp_path / "checkpoints").glob("checkpoint-*"))
    with pytest.raises(UserError, match=r"--learning-rate was None and is 0\.001"):
        layer_surgery.foresee_heal(result, resume=kept, **options | {"learning_rate": 1e-3})


def test_both_models_are_counted_and_nothing_is_asked_before(result: Path, options: dict[str, Any]) -> None:
    found = layer_surgery.foresee_heal(result, both_models=True, loss="stones", **options)
    training = next(each for each in found.stages if each.name == "heal_train")
    assert training.parts["the original"] > 0 and "heal_ask" not in names(found)
    assert any("stones" in words for words in found.left_out)


def test_minutes_say_how_many_steps_there_are(result: Path, options: dict[str, Any]) -> None:
    del options["tokens"]
    short, long = (layer_surgery.foresee_heal(result, minutes=minutes, **options) for minutes in (0.5, 2.0))
    seconds = [
        sum(each.seconds or 0 for each in found.stages if each.name.startswith("heal")) for found in (short, long)
    ]
    assert 15 < seconds[0] < 60 and 60 < seconds[1] < 240


def test_the_command_prints_a_table_or_json(run: CommandLine, result: Path, words: Path, tmp_path: Path) -> None:
    arguments = ["heal", result, "--data", words, "--eval-data", words, "--sequence-length", 16, "--tokens", 500]
    arguments += ["--continuations", 0, "--dry-run"]
    table = run(*arguments, "--output", tmp_path / "out", "--teacher-cache", tmp_path / "cache")
    assert table.code == 0, table.err
    for words_ in (
        "evaluating the model before healing",
        "training (all)",
        "--teacher-cache: up to",
        "not in the times",
    ):
        assert words_ in table.out
    assert strict_json(run(*arguments, "--json").out)["probed"]["optimiser"] > 0
    refused = run(*arguments, "--memory-limit", "50MB")
    assert refused.code == 2 and "--memory-limit (or what is free) is 50,000,000" in refused.err
    assert listing(tmp_path) == {}


def test_healing_after_a_compression_is_counted(result: Path, words: Path) -> None:
    heal = {"tokens": 1500, "general": 0.0, "stages": ("local", "global")}
    data = {"calibration": str(words), "eval_data": str(words), "samples": 8, "batch_size": 2}
    found = layer_surgery.foresee(result.parent / "MODEL", layers=[1, 2], heal=heal, **data, **QUICK)
    between = ["evaluate_unhealed", "heal_local", "heal_probe", "heal_ask", "heal_train", "evaluate_after"]
    assert names(found)[-6:] == between
    assert all(each.seconds is not None and each.seconds > 0 for each in found.stages)
    assert any("because the result is smaller" in words for words in found.left_out)


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression", "tags", "masked_token", "embedding"])
def test_other_heads_have_a_foresight_too(problem: Problem, words: Path, tmp_path: Path) -> None:
    if problem == "embedding":
        model, data = saved_embedder(tmp_path / "model", others=(dense(32, 16),)), tmp_path / "data.jsonl"
        rows = (f"the quick fox {'jumps ' * (number % 5)}{number}" for number in range(60))
        data.write_text("\n".join(json.dumps({"text": text}) for text in rows), encoding="utf-8")
    else:
        model = saved_encoder(tmp_path / "model", problem)
        data = words if problem == "masked_token" else labelled_file(tmp_path / "data.jsonl", problem)
    given: dict[str, Any] = {"eval_data": None, "sequence_length": 32, "continuations": 0}
    cut = {"layers": [1, 2], "keep": 0.2, "method": "svd", "samples": 40}
    layer_surgery.compress(model, tmp_path / "smaller", calibration=str(data), **cut, **given)
    found = layer_surgery.foresee_heal(
        tmp_path / "smaller", data=str(data), tokens=500, stages=("local", "global"), **given
    )
    parts = [each for each in found.stages if each.name.startswith("heal_")]
    assert [each.name for each in parts] == ["heal_local", "heal_probe", "heal_ask", "heal_train"]
    assert all(each.seconds is not None and each.seconds > 0 for each in parts)


def test_too_small_a_disk_is_refused(
    result: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int = 100

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage())
    expected = r"scratch files and what --checkpoints keeps would take up to [\d,]+ bytes.* has 100 free; make room"
    with pytest.raises(UserError, match=expected):
        layer_surgery.foresee_heal(result, checkpoints=tmp_path / "kept", **options)


@pytest.fixture
def seven_billions(
    result: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[ForeseenHealing, Process]:
    """A healing of 32 layers as large as Llama-7B's, with the rates and the text of a tiny one."""
    taken: list[ForeseenHealing] = []
    measure = ForeseenHealing.measure

    def keep(*given: Any, **named: Any) -> ForeseenHealing:
        taken.append(measure(*given, **named))
        return taken[0]

    monkeypatch.setattr(foresight.ForeseenHealing, "measure", keep)
    layer_surgery.foresee_heal(result, **options)
    sizes = llama_7b(texts=(), length=2048)
    sizes = sizes.with_(layers=sizes.layers[:1] * 32)
    trained = Numbers(all=6_738_149_376, outside=262_144_000, added=0)
    case = replace(taken[0].case, teacher=sizes, student=sizes, trained=trained)
    activations = dict.fromkeys(range(32), 4e5 * 128)  # windows have 16 tokens here and 2,048 there
    rates = replace(taken[0].rates, activations=activations)
    healing = replace(taken[0], case=case, rates=rates)
    return healing, Process(cast(Session, SimpleNamespace(device=torch.device("cpu"))), GB)


@pytest.mark.parametrize(
    ("settings", "available", "option"),
    [
        ({"batch_size": 8}, 170 * GB, "--batch-size 2"),
        ({"batch_size": 2}, 140 * GB, "--gradient-checkpointing"),
        ({"batch_size": 1}, 100 * GB, "--train head"),
        ({"both_models": True}, 330 * GB, "no --both-models"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_option_that_makes_it_fit(
    seven_billions: tuple[ForeseenHealing, Process], settings: dict[str, Any], available: int, option: str
) -> None:
    healing, process = seven_billions
    both = "both_models" in settings
    case: HealingCase = replace(healing.case, both_models=True) if both else healing.case.with_sizes(**settings)
    peak = max(each.memory_bytes for each in healing.stages(case, process))
    found = replace(healing, case=case).that_fit(available, lambda other: healing.stages(other, process))
    assert peak > available, f"{peak:,}"
    assert option in found, found


def test_what_is_kept_for_gradients_is_counted() -> None:
    layer = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8, bias=False))
    x = torch.randn(5, 8)
    # The input, and what comes out of the nonlinearity, once; weights do not count.
    assert kept_for_gradients(layer, lambda: layer(x)) == 4 * 5 * (8 + 16)
    layer.requires_grad_(False)
    assert kept_for_gradients(layer, lambda: layer(x)) == 0
