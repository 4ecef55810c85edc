"""Whatever is wrong with what `heal` is asked for: one sentence, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import CommandLine, assert_refused, edit_json, listing, saved_model

import layer_surgery
from layer_surgery.errors import UserError
from layer_surgery.healing.trainable import adapter_targets

QUICK: dict[str, Any] = {"sequence_length": 16, "eval_data": None, "samples": 8}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("original") / "MODEL")


@pytest.fixture(scope="module")
def result(original: Path) -> Path:
    """The original without a layer, beside it."""
    output = original.parent / "smaller"
    layer_surgery.compress(original, output, target_layers=3, keep=0, method="remove", refit=False, **QUICK)
    return output


@pytest.fixture
def heal(run: CommandLine, result: Path, original: Path, text: Path, tmp_path: Path) -> Any:
    """Return what runs `heal` with options, on the result unless another is given."""

    def heal(*options: object, model: object = result, data: object = text, teacher: object = original) -> Any:
        given = ["--no-eval", "--output", tmp_path / "out"]
        given += [] if "--sequence-length" in options else ["--sequence-length", 16]
        given += [] if data is None else ["--data", data]
        given += [] if teacher is None else ["--teacher", teacher]
        return run("heal", model, *given, *options)

    return heal


WRONG = [
    ("--minutes 0", "--minutes is 0.0; allowed: a number above 0"),
    ("--minutes nan", "--minutes is nan; allowed"),
    ("--minutes 1 --tokens 100", "--minutes and --tokens", "give only one"),
    ("--tokens 0", "--tokens is 0; allowed: 1 or more"),
    ("--tokens 1000000000000000", "--tokens is 1,000,000,000,000,000; allowed: at most"),
    ("--learning-rate -1", "--learning-rate is -1.0; allowed: a number above 0"),
    ("--train some", "--train is 'some'; allowed: all, factors, operated, last, head, lora"),
    ("--train factors", "--train factors finds nothing to train", "no linear that the surgery made smaller"),
    ("--train lora --stages local", "--train lora", "leave out --stages local"),
    ("--lora-rank 0", "--lora-rank is 0; allowed: 1 or more"),
    ("--step-sequences 0", "--step-sequences is 0; allowed: 1 or more"),
    ("--general 2", "--general is 2.0; allowed: a fraction from 0 to 1"),
    ("--stages half", "--stages is 'half'; allowed: local, global, or both"),
    ("--local-error l1", "--local-error is 'l1'; allowed: fisher, mse"),
    ("--loss kll", "unknown loss 'kll'", "Did you mean 'kl'?"),
    ("--loss kl:0", "the weight of 'kl'", "a number above 0"),
    ("--loss attention", "--loss attention looks at original and student together; add --both-models, which keeps"),
    ("--loss stones", "--loss stones looks at original and student together; add --both-models"),
    ("--loss stones:1:blocks=0", "'blocks' is '0'; allowed: a whole number, 1 or more"),
    ("--loss hidden:1:projected=2", "'projected' is '2'; allowed: a whole number, 0 or more, at most 1"),
    ("--both-models --loss ce", "--both-models has nothing to do: --loss ce looks at nothing"),
    ("--both-models --teacher-cache x", "there is nothing for --teacher-cache to keep"),
    ("--both-models --stages local", "--both-models is of the global stage"),
    (
        "--both-models --memory-limit 100KB",
        "--both-models keeps the original (",
        "100,000 bytes are available; leave it",
    ),
    ("--loss relations:1:heads=5", "--loss relations has heads=5, which does not divide", "take a divisor of 24, 48"),
    ("--tokens 100 --resume no-such", "--resume no-such", "no checkpoint"),
    ("--resume no-such", "--resume goes on", "give the same --tokens"),
    ("--sequence-length 65", "--sequence-length is 65", "at most 64"),
]


def test_folders_that_cannot_be_made_and_pipes_are_refused(heal: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "loss.yaml")
    for option in ("--teacher-cache", "--checkpoints"):
        for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
            assert_refused(heal("--tokens", 100, option, folder), option, "give another directory")
    assert_refused(heal("--tokens", 100, "--resume", tmp_path / ("n" * 300)), "--resume", "File name too long")
    assert_refused(heal("--tokens", 100, "--loss", tmp_path / "loss.yaml"), "--loss", "no regular file")
    assert sorted(listing(tmp_path)) == ["file", "loss.yaml"]


@pytest.mark.parametrize(("options", "expected"), [(case[0], case[1:]) for case in WRONG])
def test_a_wrong_option_is_refused(heal: Any, tmp_path: Path, options: str, expected: tuple[str, ...]) -> None:
    assert_refused(heal(*options.split()), *expected)
    assert listing(tmp_path) == {}


def test_no_text_and_too_little_text_are_refused(heal: Any, tmp_path: Path) -> None:
    assert_refused(heal(data=None), "--data names no text")
    short = tmp_path / "short.txt"
    short.write_text("one two three four " * 20, encoding="utf-8")
    assert_refused(heal(data=short), "short.txt", "too few to hold some out", "16; pass more text")
    assert_refused(heal(data=tmp_path / "none.txt"), "there is no file")


def test_the_options_behind_heal_need_it_and_are_named_with_their_prefix(
    run: CommandLine, original: Path, text: Path, tmp_path: Path
) -> None:
    command = ["compress", original, "--target-layers", 3, "--calibration", text, "--output", tmp_path / "out"]
    assert_refused(run(*command, "--heal-minutes", 1), "--heal-minutes only counts with --heal; add that")
    assert_refused(run(*command, "--heal", "--heal-minutes", 0), "--heal-minutes is 0.0; allowed")
    assert_refused(run(*command, "--heal", "--heal-train", "x"), "--heal-train is 'x'; allowed")
    small = ("--samples", 8, "--sequence-length", 16)
    outcome = run(*command, *small, "--heal", "--heal-loss", "stones")
    assert_refused(outcome, "--heal-loss stones looks", "add --heal-both-models")
    with pytest.raises(UserError, match=r"--heal has no option 'minute'\. Did you mean 'minutes'\?"):
        layer_surgery.compress(original, tmp_path / "out", target_layers=3, heal={"minute": 1})
    with pytest.raises(UserError, match=r"--heal-tokens is 'many'; give a whole number\."):
        layer_surgery.compress(original, tmp_path / "out", target_layers=3, heal={"tokens": "many"})


def test_what_is_no_result_is_refused(heal: Any, original: Path, tmp_path: Path) -> None:
    assert_refused(heal(model=original), "has no surgery.json", "`layer-surgery compress` has written")
    assert_refused(heal(model=tmp_path / "nothing"), "has no surgery.json")


def test_a_teacher_that_it_was_not_made_of_is_refused(
    heal: Any, original: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("teachers")
    other = saved_model(folder / "other", seed=1)
    assert_refused(heal(teacher=other), "was not made of the teacher", "SHA-256", "give --teacher")
    larger = saved_model(folder / "larger", vocab_size=400)
    assert_refused(heal(teacher=larger), "vocabulary of 400", "320", "one cannot follow the other")
    renamed = saved_model(folder / "renamed")
    tokenizer = json.loads((renamed / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert_refused(heal(teacher=renamed), "different vocabularies")
    template = saved_model(folder / "template")
    (template / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert_refused(heal(teacher=template), "different chat templates")


def test_a_teacher_that_is_gone_is_asked_for(heal: Any, result: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import shutil

    moved = tmp_path_factory.mktemp("moved") / "smaller"
    shutil.copytree(result, moved)
    edit_json(moved / "surgery.json", base_model={"name": "no-such-model", "sha256": "0"})
    assert_refused(heal(model=moved, teacher=None), "no-such-model", "not there any more", "give --teacher MODEL")


def test_lora_without_peft_or_without_linears_is_refused(heal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert_refused(heal("--train", "lora"), "--train lora needs PEFT", "pip install peft")
    without = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList([torch.nn.LayerNorm(4)]), "head": torch.nn.Linear(4, 4)}
    )
    with pytest.raises(UserError, match="--train lora finds no linear in the layers"):
        adapter_targets(without, "layers")
