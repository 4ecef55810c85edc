"""Healing of encoders and classifiers from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoints import CommandLine, assert_refused, listing, tensors_of
from tiny_encoders import encoder_tokenizer, labelled_file, saved_encoder

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data import load_documents, pack_evaluation
from layer_surgery.data.objective import Problem

QUICK: dict[str, Any] = {"continuations": 0}
HEAL: dict[str, Any] = QUICK | {"learning_rate": 1e-3, "tokens": 1200}


def trained(directory: Path, problem: Problem, data: Path, model_type: str = "bert") -> Path:
    """Save a tiny classifier that has learnt a little, so that there is something to heal."""
    saved_encoder(directory, problem, model_type)
    objective = open_checkpoint(directory).objective
    documents = load_documents(str(data), part="calibration", wanted="tags" if problem == "tags" else "labels")
    tokens = pack_evaluation(documents, encoder_tokenizer(), sequence_length=64, objective=objective)
    kinds = {"tags": "TokenClassification"}
    auto_class = getattr(transformers, f"AutoModelFor{kinds.get(problem, 'SequenceClassification')}")
    model = auto_class.from_pretrained(directory).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(15):
        model(**tokens.inputs(slice(None)), labels=tokens.labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval().save_pretrained(directory)
    return directory


def test_a_healed_classifier_is_better_and_a_result_like_any_other(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = labelled_file(tmp_path / "data.jsonl", "single_label")
    model = trained(tmp_path / "model", "single_label", data)
    cut = {"layers": [1, 2, 3], "keep": 0.15, "method": "svd", "samples": 50}
    layer_surgery.compress(model, tmp_path / "smaller", calibration=str(data), eval_data=None, **cut, **QUICK)
    given = {"data": str(data), "eval_data": str(data), "loss": ["kl", "ce:0.5", "hidden:0.1"], **HEAL}
    cache = tmp_path / "cache"
    report = layer_surgery.heal(tmp_path / "smaller", tmp_path / "healed", teacher_cache=cache, **given)
    assert report.healing is not None and report.healing.helped and report.unhealed is not None
    assert report.unhealed.gain.tasks[str(data)]["loss"].value < -0.01
    assert set(report.healing.curve[-1].losses) == {"kl", "ce", "hidden"}
    assert report.healing.held_out_windows == 60 // 8 and report.healing.general_windows == 0
    assert report.healing.tokens == 16 * report.healing.steps  # examples
    assert report.healing.teacher_bytes_per_token == 3 * 4
    classify = transformers.pipeline("text-classification", model=str(tmp_path / "healed"), trust_remote_code=True)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    correct = [classify(row["text"])[0]["label"] == row["label"] for row in rows]
    assert report.after.tasks[str(data)].metrics["accuracy"].value == pytest.approx(sum(correct) / len(rows))
    page = (tmp_path / "healed" / "report.html").read_text(encoding="utf-8")
    assert f"rained it on {report.healing.tokens} examples to follow the original" in page
    assert "(nats per example)" in page and "nats per token" not in page
    assert layer_surgery.verify(tmp_path / "healed").problems == []

    kept = next(cache.glob("outputs-*.safetensors"))
    monkeypatch.setattr(
        "layer_surgery.runs.healing.asking.asked", lambda *_: pytest.fail("the original was asked again")
    )
    again = given | {"eval_data": None, "loss": ["kl", "ce:0.5"], "teacher_cache": cache}
    layer_surgery.heal(tmp_path / "smaller", tmp_path / "again", **again)
    monkeypatch.undo()
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    outcome = run(
        *("heal", tmp_path / "smaller", "--data", data, "--no-eval", "--teacher-cache", cache, "--tokens", 1200),
        *("--loss", "kl", "--loss", "ce:0.5", "--learning-rate", 1e-3, "--output", tmp_path / "third"),
    )
    assert outcome.code == 0 and "is damaged; the teacher is asked again" in outcome.err
    one, other = tensors_of(tmp_path / "again"), tensors_of(tmp_path / "third")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_masked_language_model_is_healed_after_a_compression(tmp_path: Path, text: Path) -> None:
    model = saved_encoder(tmp_path / "model", "masked_token")
    report = layer_surgery.compress(
        model,
        tmp_path / "output",
        target_layers=4,
        keep=0,
        method="remove",
        calibration=str(text),
        eval_data=str(text),
        samples=20,
        sequence_length=16,
        heal={"tokens": 1000, "learning_rate": 1e-3, "loss": ["kl", "ce"], "train": "last"},
        **QUICK,
    )
    assert report.healing is not None and report.healing.helped and report.healing.general_windows > 0
    assert set(report.healing.curve[0].validation) == {"validation", "general"}
    healed, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "output", output_loading_info=True)
    assert healed.config.model_type == "bert" and not info["missing_keys"] and not info["unexpected_keys"]


def test_each_changed_layer_of_a_tagger_is_healed_by_itself(tmp_path: Path) -> None:
    data = labelled_file(tmp_path / "data.jsonl", "tags")
    model = trained(tmp_path / "model", "tags", data, "modernbert")
    cut = {"layers": [1, 2], "keep": 0.1, "method": "svd", "samples": 50}
    layer_surgery.compress(model, tmp_path / "smaller", calibration=str(data), eval_data=None, **cut, **QUICK)
    report = layer_surgery.heal(
        tmp_path / "smaller", tmp_path / "healed", data=str(data), eval_data=None, stages=["local"], **HEAL
    )
    assert report.healing is not None
    assert [record.layer for record in report.healing.local] == [1, 2]
    assert all(record.kept and record.after < record.before for record in report.healing.local)


def test_what_a_head_cannot_be_healed_by_is_refused(
    run: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = labelled_file(tmp_path / "data.jsonl", "regression")
    model = saved_encoder(tmp_path / "model", "regression")
    before = listing(tmp_path)
    given = ("--calibration", data, "--layers", "2", "--method", "remove", "--no-eval", "--output", tmp_path / "output")
    for options, said in (
        (("--heal-teacher-rewrite",), "--heal-teacher-rewrite has a causal language model write answers"),
        (("--heal-loss", "jsd"), "--heal-loss jsd is a loss of distributions, but the model gives numbers"),
    ):
        assert_refused(run("compress", model, *given, "--heal", *options), said)
    few = labelled_file(tmp_path / "few.jsonl", "regression", rows=9)
    assert_refused(
        run("compress", model, *given, "--heal", "--heal-data", few),
        "has 9 examples, too few to hold some out and train on the rest, which takes 16; pass more examples.",
    )
    few.unlink()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert_refused(run("compress", model, *given, "--heal"), "accelerate was told --use_fsdp; leave that out")
    assert listing(tmp_path) == before
