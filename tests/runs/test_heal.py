"""Healing from beginning to end: what is written, what it says, and that nothing is ever worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import (
    CommandLine,
    load_stock,
    logits,
    model_with_vocabulary,
    saved_model,
    tensors_of,
    text_file,
)
from tiny_models import changes, snapshot
from tiny_tokenizer import tiny_tokenizer

import layer_surgery
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.disk.locks import locked
from layer_surgery.healing.body import Body
from layer_surgery.records.reading import read_report

QUICK: dict[str, Any] = {"sequence_length": 16, "eval_windows": 8, "continuations": 0}
HEAL: dict[str, Any] = QUICK | {"tokens": 1500, "learning_rate": 3e-3, "general": 0.0}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("words") / "words.txt", lines=150)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """A tiny model that has learnt a little, so that there is something to heal."""
    torch.manual_seed(0)
    model = model_with_vocabulary().train()
    ids = torch.tensor(tiny_tokenizer()(words.read_text(encoding="utf-8"))["input_ids"])[:960].view(-1, 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return saved_model(tmp_path_factory.mktemp("original") / "MODEL", model=model.eval())


@pytest.fixture(scope="module")
def result(original: Path, words: Path) -> Path:
    """Low-rank layers beside whole ones."""
    output = original.parent / "smaller"
    layer_surgery.compress(
        original, output, layers=[1, 2], keep=0.2, method="svd", calibration=str(words), samples=16, **QUICK
    )
    return output


@pytest.fixture(scope="module")
def healed(result: Path, original: Path, words: Path) -> Path:
    output = original.parent / "healed"
    layer_surgery.heal(result, output, data=str(words), eval_data=str(words), **HEAL)
    return output


def test_the_result_is_better_and_a_result_like_any_other(healed: Path, result: Path, original: Path) -> None:
    report = read_report(healed / "surgery.json")
    assert report.healing is not None and report.unhealed is not None
    assert report.healing.helped
    change = next(iter(report.unhealed.gain.perplexity.values())).ratio
    assert change.high < 1
    assert read_report(result / "surgery.json").plan == report.plan
    files = {path.name for path in healed.iterdir()}
    assert files == {path.name for path in result.iterdir()}
    before, after = open_checkpoint(result), open_checkpoint(healed)
    assert (after.parameters, after.low_rank, after.dtype) == (before.parameters, before.low_rank, before.dtype)
    ids = torch.arange(12)[None]
    ours = layer_surgery.load(healed)
    assert not torch.equal(logits(ours, ids), logits(layer_surgery.load(result), ids))


def test_a_healed_result_can_be_verified(healed: Path) -> None:
    assert layer_surgery.verify(healed).problems == []


def test_what_is_evaluated_is_what_is_saved(healed: Path, words: Path) -> None:
    report = read_report(healed / "surgery.json")
    again = layer_surgery.evaluate(healed, eval_data=str(words), **QUICK)
    assert again.model.perplexity[str(words)].value == pytest.approx(
        report.after.perplexity[str(words)].value, rel=1e-6
    )


def test_it_says_what_was_done(healed: Path, run: CommandLine) -> None:
    page = (healed / "report.html").read_text(encoding="utf-8")
    card = (healed / "README.md").read_text(encoding="utf-8")
    assert "healing-validation" in page and "after healing" in page
    assert "to follow the original (kl; all weights)" in page and "to follow the original" in card
    assert "Healed on:" in card and "after surgery" in card
    assert run("report", healed).code == 0


def test_tokens_are_a_budget_that_gives_the_same_again(healed: Path, result: Path, words: Path, tmp_path: Path) -> None:
    layer_surgery.heal(result, tmp_path / "again", data=str(words), eval_data=None, **HEAL)
    first, second = tensors_of(healed), tensors_of(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("train", ["factors", "operated", "last", "lora"])
def test_only_what_is_to_be_trained_changes(result: Path, words: Path, tmp_path: Path, train: str) -> None:
    options = HEAL | {"train": train, "eval_data": None}
    report = layer_surgery.heal(result, tmp_path / "out", data=str(words), **options)
    assert report.healing is not None and report.healing.helped
    before, after = tensors_of(result), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name for name, tensor in before.items() if tensor.dim() == 1}
    matrices = changed - norms
    assert changed & norms
    expected = {
        "factors": {name for name in before if "_factor" in name},
        "operated": {name for name in before if name.startswith(("model.layers.1.", "model.layers.2."))} - norms,
        "last": {name for name in before if name.startswith(("model.layers.3.", "lm_head."))} - norms,
        "lora": {name for name in before if name.startswith("model.layers.")} - norms,
    }[train]
    assert matrices == expected
    load_stock(original_of(tmp_path / "out")) if train == "never" else None


def original_of(path: Path) -> Path:
    return path


def test_a_training_goes_on_from_its_own_checkpoints_only(result: Path, words: Path, tmp_path: Path) -> None:
    options = HEAL | {"tokens": 800, "data": str(words), "eval_data": None}
    layer_surgery.heal(result, tmp_path / "whole", checkpoints=tmp_path / "kept", **options)
    first = min(tmp_path.glob("kept/checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))
    layer_surgery.heal(result, tmp_path / "resumed", resume=first, **options)
    whole, resumed = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other: dict[str, Any] = {"train": "last", "learning_rate": 1e-3, "tokens": 100, "loss": "ce", "seed": 1}
    for name, value in other.items():
        with pytest.raises(layer_surgery.UserError, match=f"of another training: --{name.replace('_', '-')} was"):
            layer_surgery.heal(result, resume=first, no_save=True, **options | {name: value})
    with pytest.raises(layer_surgery.UserError, match=r"the result \(sha256\) was"):
        layer_surgery.heal(tmp_path / "whole", resume=first, no_save=True, **options)
    (first / "training.json").unlink()
    with pytest.raises(layer_surgery.UserError, match="does not say what it was trained on"):
        layer_surgery.heal(result, resume=first, no_save=True, **options)


def test_if_nothing_is_gained_the_result_is_the_one_from_before(
    result: Path, words: Path, tmp_path: Path, run: CommandLine
) -> None:
    options = ["--data", words, "--tokens", 300, "--learning-rate", 30, "--sequence-length", 16, "--no-eval"]
    outcome = run("heal", result, *options, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "gained nothing on held-out text, so the result is the model from before healing" in " ".join(
        outcome.out.split()
    )
    before, after = tensors_of(result), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "gained nothing" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_removed_layers_are_healed_in_a_plain_checkpoint_after_a_compression(
    original: Path, words: Path, tmp_path: Path
) -> None:
    options = {name: HEAL[name] for name in ("tokens", "learning_rate", "general")}
    report = layer_surgery.compress(
        original,
        tmp_path / "out",
        target_layers=3,
        keep=0,
        method="remove",
        calibration=str(words),
        eval_data=str(words),
        samples=16,
        heal=options | {"loss": ["kl:1", "hidden:0.1"]},
        **QUICK,
    )
    assert report.healing is not None and report.unhealed is not None
    assert report.healing.helped and set(report.healing.curve[-1].losses) == {"kl", "hidden"}
    assert next(iter(report.unhealed.gain.perplexity.values())).ratio.value < 1
    model, info = load_stock(tmp_path / "out")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.model_type == "llama" and model.config.num_hidden_layers == 3
    settings = json.loads((tmp_path / "out" / "surgery.json").read_text())["provenance"]["config"]
    assert settings["heal"] is True and settings["heal_tokens"] == 1500


def test_the_local_stage_lowers_the_error_of_each_changed_layer(result: Path, words: Path, tmp_path: Path) -> None:
    options = HEAL | {"stages": ["local"], "eval_data": None}
    report = layer_surgery.heal(result, tmp_path / "out", data=str(words), **options)
    assert report.healing is not None
    assert [record.layer for record in report.healing.local] == [1, 2]
    assert all(record.kept and record.after < record.before for record in report.healing.local)
    before, after = tensors_of(result), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in changed)


def test_a_model_in_memory_is_not_touched(original: Path, result: Path, words: Path) -> None:
    teacher = layer_surgery.load(original)
    before = snapshot(teacher)
    layer_surgery.heal(result, no_save=True, teacher=teacher, data=str(words), eval_data=None, **HEAL)
    assert changes(before, snapshot(teacher)) == []


def test_the_probe_chooses_a_rate_within_the_minutes(result: Path, words: Path) -> None:
    options = QUICK | {"minutes": 0.05, "general": 0.25, "eval_data": None}
    report = layer_surgery.heal(result, no_save=True, data=str(words), **options)
    assert report.healing is not None
    tried = {point.learning_rate: point.regret for point in report.healing.probe}
    assert report.healing.learning_rate == min(tried, key=lambda rate: tried[rate] or 0.0)
    assert "general" in report.healing.curve[0].validation


def test_a_file_of_the_schema_before_is_read(healed: Path, tmp_path: Path) -> None:
    data = json.loads((healed / "surgery.json").read_text(encoding="utf-8"))
    older = {name: value for name, value in data.items() if name not in ("healing", "unhealed")} | {"schema_version": 3}
    (tmp_path / "surgery.json").write_text(json.dumps(older), encoding="utf-8")
    report = read_report(tmp_path / "surgery.json")
    assert report.healing is None and report.unhealed is None


def test_examples_are_healed_on_their_answers_and_by_losses_that_look_at_everything(
    result: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"one two {number}", "answer": "the answer is the other thing"} for number in range(60)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = HEAL | {"sequence_length": 32, "eval_data": None, "loss": ["dkd:0.1", "cosine:1"]}
    report = layer_surgery.heal(result, no_save=True, data=str(tmp_path / "task.jsonl"), **options)
    assert report.healing is not None and report.healing.helped
    assert report.healing.data is not None and report.healing.data["sequences"] == 60
    assert report.healing.data["predicted_tokens"] < report.healing.data["tokens"]
    assert report.healing.teacher_bytes_per_token is None  # nothing was cut off


def test_relations_of_an_operated_last_layer_are_healed_beside_other_losses(
    original: Path, words: Path, tmp_path: Path
) -> None:
    cut = {"layers": [2, 3], "keep": 0.2, "method": "svd", "samples": 16, **QUICK}
    layer_surgery.compress(original, tmp_path / "smaller", calibration=str(words), **cut)
    options = HEAL | {"eval_data": None, "train": "factors", "tokens": 2500}
    report = layer_surgery.heal(
        tmp_path / "smaller", no_save=True, data=str(words), loss=["relations:2:heads=2", "kl", "hidden:0.1"], **options
    )
    assert report.healing is not None and report.healing.helped
    first, last = report.healing.curve[1].losses, report.healing.curve[-1].losses
    assert last.keys() == {"relations", "kl", "hidden"}
    assert 0 < last["relations"] < 0.95 * first["relations"]


def test_the_original_is_asked_once_for_the_same_data(
    result: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = HEAL | {"eval_data": None, "teacher_cache": tmp_path / "cache"}
    first = layer_surgery.heal(result, tmp_path / "first", data=str(words), **options)
    monkeypatch.setattr(
        "layer_surgery.runs.healing.asking.asked", lambda *_: pytest.fail("the original was asked again")
    )
    second = layer_surgery.heal(result, tmp_path / "second", data=str(words), **options)
    one, other = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first.healing is not None and second.healing is not None
    assert first.healing.teacher_bytes_per_token == second.healing.teacher_bytes_per_token


def test_a_cache_that_another_run_writes_is_left_to_it(
    result: Path, words: Path, tmp_path: Path, run: CommandLine
) -> None:
    options = ["--data", words, "--tokens", 300, "--learning-rate", 1e-3, "--sequence-length", 16, "--no-eval"]
    cache = tmp_path / "cache"
    assert run("heal", result, *options, "--teacher-cache", cache, "--output", tmp_path / "first").code == 0
    (folder,) = cache.iterdir()
    (folder / "teacher.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with locked(folder):
        outcome = run("heal", result, *options, "--teacher-cache", cache, "--output", tmp_path / "second")
    assert outcome.code == 0 and "another run is writing" in outcome.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    one, other = tensors_of(tmp_path / "first"), tensors_of(tmp_path / "second")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    result: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: CommandLine
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("layer_surgery.healing.teacher.cache.save_file", full)
    options = ["--data", words, "--tokens", 300, "--learning-rate", 1e-3, "--sequence-length", 16, "--no-eval"]
    outcome = run("heal", result, *options, "--teacher-cache", tmp_path / "cache", "--output", tmp_path / "out")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "--teacher-cache" in outcome.error_lines[-1] and "No space left on device" in outcome.error_lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with answers of different lengths."""
    file = tmp_path_factory.mktemp("examples") / "task.jsonl"
    rows = [
        {"prompt": f"one two {number}", "answer": "the answer " * (7 if number % 4 == 0 else 1) + "is the other thing"}
        for number in range(60)
    ]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


BOTH: dict[str, Any] = {"both_models": True, "loss": ["stones:0.5", "attention:0.01", "kl:1", "hidden:0.1:projected=1"]}


def test_both_models_in_memory_and_rows_that_are_shared_go_on_where_they_were_stopped(
    result: Path, examples: Path, tmp_path: Path
) -> None:
    options = HEAL | BOTH | {"sequence_length": 48, "eval_data": None, "data": str(examples), "train": "operated"}
    options |= {"step_sequences": 8, "tokens": 1000}
    whole = layer_surgery.heal(result, tmp_path / "whole", checkpoints=tmp_path / "kept", **options)
    assert whole.healing is not None and whole.healing.helped
    assert set(whole.healing.curve[-1].losses) == {"stones", "attention", "kl", "hidden"}
    assert whole.healing.curve[-1].losses["stones"] < whole.healing.curve[1].losses["stones"]
    steps = sorted(int(path.name.rpartition("-")[2]) for path in (tmp_path / "kept").glob("checkpoint-*"))
    assert len(steps) > 2
    resume = tmp_path / "kept" / f"checkpoint-{steps[1]}"
    layer_surgery.heal(result, tmp_path / "resumed", checkpoints=tmp_path / "again", resume=resume, **options)
    one, other = (tensors_of(tmp_path / name) for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_short_windows_share_rows_without_another_result(
    result: Path, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = HEAL | {"sequence_length": 48, "eval_data": None, "data": str(examples), "tokens": 1000}
    shapes: list[tuple[int, int]] = []
    states = Body.states

    def watched(self: Body, given: Any, positions: Any = ()) -> Any:
        if torch.is_grad_enabled():
            shapes.append(tuple(given["input_ids"].shape))
        return states(self, given, positions)

    monkeypatch.setattr(Body, "states", watched)
    packed = layer_surgery.heal(result, no_save=True, **options).healing
    rows = sum(count * length for count, length in shapes)
    assert packed is not None and packed.helped
    monkeypatch.setattr("layer_surgery.runs.healing.stage.packs", lambda *_: False)
    shapes.clear()
    padded = layer_surgery.heal(result, no_save=True, **options).healing
    assert rows < sum(count * length for count, length in shapes)
    assert padded is not None
    for one, other in zip(packed.curve, padded.curve, strict=True):
        assert one.losses == pytest.approx(other.losses, abs=1e-5)
        assert one.validation == pytest.approx(other.validation, abs=1e-5)
