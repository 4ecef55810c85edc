"""`verify`: damaged, stale and good results told from each other, by what is in the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import (
    CommandLine,
    edit_json,
    edit_tensors,
    listing,
    model_with_vocabulary,
    saved_model,
    strict_json,
)

import layer_surgery
from layer_surgery.errors import CheckpointError, ReportError, UserError


@pytest.fixture
def result(model: Path, tmp_path: Path) -> Path:
    """A result in shards, with low-rank layers, and its original beside it."""
    base = shutil.copytree(model, tmp_path / "base")
    layer_surgery.compress(base, tmp_path / "output", layers=[1], keep=0.3, method="svd", eval_data=None)
    return tmp_path / "output"


def test_a_new_result_is_good(run: CommandLine, result: Path) -> None:
    before = listing(result)
    outcome = run("verify", result)
    assert outcome.code == 0
    assert "original: same" in outcome.out
    found = strict_json(run("verify", result, "--json").out)
    assert (found["damaged"], found["missing"], found["unlisted"], found["base"]) == ([], [], [], "same")
    assert found["files"] == len(before) - 3  # without surgery.json, page and card
    assert listing(result) == before


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit of the weights": (lambda path: flipped(path / "model.safetensors"), "model.safetensors is damaged"),
    "half of the weights": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000]),
        "model.safetensors is damaged",
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "other code": (
        lambda path: (path / "modeling_layer_surgery.py").write_text("import os"),
        "modeling_layer_surgery.py is damaged",
    ),
    "another original": (
        lambda path: edit_tensors(path.parent / "base", lambda found: found["model.norm.weight"].mul_(2.0)),
        "the result is stale",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_or_stale_is_named(run: CommandLine, result: Path, name: str) -> None:
    damage, expected = DAMAGES[name]
    damage(result)
    outcome = run("verify", result)
    assert outcome.code == 1
    assert outcome.error_lines[-1].startswith(f"error: {result} is not good: ") and expected in outcome.error_lines[-1]
    (problem,) = layer_surgery.verify(result).problems
    assert expected in problem


def test_loading_and_evaluating_compare_first_if_asked_to(
    run: CommandLine, result: Path, text: Path, model: Path
) -> None:
    options = ["--eval-data", text, "--eval-windows", "1", "--sequence-length", "16", "--continuations", "0"]
    assert run("evaluate", result, "--verify", *options).code == 0
    layer_surgery.load(result, verify=True)
    flipped(result / "model.safetensors")
    layer_surgery.load(result)  # a bit of a number: nobody could tell
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written; copy it again"):
        layer_surgery.load(result, verify=True)
    outcome = run("evaluate", result, "--verify", *options)
    assert outcome.code == 2 and "model.safetensors is not what was written" in outcome.err
    outcome = run("evaluate", model, "--verify", *options)
    assert outcome.code == 2 and "no surgery.json" in outcome.err
    with pytest.raises(UserError, match="is in memory"):
        layer_surgery.evaluate(model_with_vocabulary(), verify=True)


def test_page_and_card_may_be_made_again_and_other_files_are_no_damage(result: Path) -> None:
    (result / "README.md").write_text("My own card")
    (result / "notes.txt").write_text("Mine")
    found = layer_surgery.verify(result)
    assert found.problems == [] and found.unlisted == ["notes.txt"]


def test_an_original_elsewhere_is_compared_if_the_user_says_where(result: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    assert layer_surgery.verify(result).base == "not found"
    assert layer_surgery.verify(result, base=str(tmp_path / "moved")).base == "same"
    other = saved_model(tmp_path / "other", dtype=torch.float16)
    assert layer_surgery.verify(result, base=str(other)).base == "changed"


def test_an_export_has_hashes_of_its_own(result: Path, tmp_path: Path) -> None:
    layer_surgery.export_dense(result, tmp_path / "dense")
    assert layer_surgery.verify(tmp_path / "dense").problems == []
    flipped(tmp_path / "dense" / "model.safetensors")
    assert layer_surgery.verify(tmp_path / "dense").damaged == ["model.safetensors"]


def test_what_has_no_list_of_files_is_refused(result: Path, tmp_path: Path) -> None:
    edit_json(result / "surgery.json", files=None)
    with pytest.raises(ReportError, match=r"has no list of files, which releases up to 0\.2 did not write"):
        layer_surgery.verify(result)
    (result / "surgery.json").write_text(
        json.dumps({"schema_version": 3, "files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}})
    )
    with pytest.raises(ReportError, match="is damaged: its list of files names '/etc/passwd'"):
        layer_surgery.verify(result)
    with pytest.raises(ReportError, match=r"has no surgery\.json"):
        layer_surgery.verify(tmp_path / "base")
