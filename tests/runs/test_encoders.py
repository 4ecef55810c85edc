"""Encoders and classifiers through every command, and their results in transformers' pipelines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoints import CommandLine, assert_refused, edit_json, listing
from tiny_encoders import TAGS, labelled_file, saved_encoder
from transformers import AutoTokenizer, BertTokenizerFast

from layer_surgery.checkpoint.heads import HEADS
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.objective import Problem
from layer_surgery.runs.session import load_tokenizer

CUT = ("--target-parameters", 0.8, "--samples", 50)


def compressed(
    run: CommandLine, tmp_path: Path, problem: Problem, *options: Any, model_type: str = "bert"
) -> tuple[Path, Path, dict[str, Any]]:
    """Compress a tiny classifier; return the result, the labelled file and `surgery.json`."""
    model = saved_encoder(tmp_path / "model", problem, model_type)
    data = labelled_file(tmp_path / "data.jsonl", problem)
    output = tmp_path / "output"
    outcome = run("compress", model, "--calibration", data, "--eval-data", data, "--output", output, *options)
    assert outcome.code == 0, outcome.err
    assert "perplexity" not in (outcome.out + outcome.err).lower()
    return output, data, json.loads((output / "surgery.json").read_text(encoding="utf-8"))


def pipeline(task: Any, directory: Path, **options: Any) -> Any:
    return transformers.pipeline(task, model=str(directory), trust_remote_code=True, **options)


def test_a_compressed_classifier_gives_in_a_pipeline_the_accuracy_that_was_measured(
    run: CommandLine, tmp_path: Path
) -> None:
    output, data, report = compressed(run, tmp_path, "single_label", *CUT, "--speed", "--speed-lengths", 16)
    assert open_checkpoint(output).low_rank
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    classify = pipeline("text-classification", output)
    correct = [classify(row["text"])[0]["label"] == row["label"] for row in rows]
    found = report["after"]["tasks"][str(data)]
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(sum(correct) / len(rows)) and found["items"] == 60
    changes = report["comparison"]["tasks"][str(data)]
    assert changes.keys() == {"accuracy", "f1_macro", "loss"}
    assert changes["loss"]["low"] <= changes["loss"]["value"] <= changes["loss"]["high"]
    assert report["base_model"]["head"] == "sequence_classification"
    assert report["after"]["flops_per_token"] < report["before"]["flops_per_token"]
    (speed,) = report["after"]["speed"]
    assert speed["prefill_tokens_per_second"] > 0 and speed["decode_tokens_per_second"] is None
    for name in ("report.html", "README.md"):
        text = (output / name).read_text(encoding="utf-8")
        assert "perplexit" not in text.lower() and "causal" not in text.lower() and "accuracy" in text
        assert "AutoModelForSequenceClassification.from_pretrained" in text
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-classification" in card and "type: text-classification" in card
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "throughput" in page and "nats per example" in page
    assert "nats per token" not in page and "KV cache" not in page


@pytest.mark.parametrize(("model_type", "component"), [("modernbert", "bypass"), ("mixtral", "routed")])
def test_a_classifier_with_another_kind_of_component_has_in_transformers_the_loss_that_was_measured(
    run: CommandLine, tmp_path: Path, model_type: str, component: str
) -> None:
    output, data, report = compressed(
        run, tmp_path, "single_label", *CUT, "--components", component, model_type=model_type
    )
    assert any(layer.get(component) for layer in report["plan"]["layers"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(output, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    losses = []
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        label = torch.tensor([model.config.label2id[row["label"]]])
        losses.append(float(model(**tokenizer(row["text"], return_tensors="pt"), labels=label).loss.detach()))
    found = report["after"]["tasks"][str(data)]["metrics"]["loss"]["value"]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_an_mlp_that_is_no_module_of_linears_only_is_not_bypassed(run: CommandLine, tmp_path: Path) -> None:
    model, data = saved_encoder(tmp_path / "model", "single_label"), labelled_file(tmp_path / "d.jsonl", "single_label")
    before = listing(tmp_path)
    given = ("--calibration", data, "--no-eval", *CUT, "--components", "bypass", "--output", tmp_path / "output")
    assert_refused(run("compress", model, *given), "--components bypass: none of the chosen layers can be cut")
    assert listing(tmp_path) == before


def test_a_tagger_without_two_layers_is_a_plain_checkpoint_with_the_answers_that_were_measured(
    run: CommandLine, tmp_path: Path
) -> None:
    cut = ("--target-layers", 3, "--keep", 0, "--samples", 50, "--method", "remove")
    output, data, report = compressed(run, tmp_path, "tags", *cut)
    assert not open_checkpoint(output).low_rank and not (output / "modeling_layer_surgery.py").exists()
    tag = pipeline("token-classification", output, ignore_labels=[])
    right = total = 0
    for line in data.read_text(encoding="utf-8").splitlines():
        row, start = json.loads(line), 0
        answers = tag(" ".join(row["tokens"]))
        for word, wanted in zip(row["tokens"], row["tags"], strict=True):
            first = next(answer for answer in answers if answer["end"] > start)
            right, total = right + (first["entity"] == wanted), total + 1
            start += len(word) + 1
    found = report["after"]["tasks"][str(data)]["metrics"]
    assert found["accuracy"]["value"] == pytest.approx(right / total) and found.keys() == {
        *("accuracy", "span_f1", "loss")
    }


def as_bert_is_on_the_hub(directory: Path) -> None:
    """Put a tokenizer into a directory of which only the model's type says that it is BERT's."""
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / file).unlink(missing_ok=True)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "answer", "is", "other", "thing"]
    letters = list("abcdefghijklmnopqrstuvwxyz")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    BertTokenizerFast(vocab=vocabulary).backend_tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 64}', "utf-8")


def test_a_masked_language_model_is_calibrated_on_text(run: CommandLine, tmp_path: Path, text: Path) -> None:
    model, output = saved_encoder(tmp_path / "model", "masked_token"), tmp_path / "output"
    as_bert_is_on_the_hub(model)
    options = ("--calibration", text, "--eval-data", text, "--sequence-length", 16, "--samples", 20)
    outcome = run("compress", model, *options, "--target-parameters", 0.8, "--output", output)
    assert outcome.code == 0, outcome.err
    assert "of general text" in outcome.err  # a refit looks at it, as for other language models
    report = json.loads((output / "surgery.json").read_text(encoding="utf-8"))
    assert report["after"]["tasks"][str(text)]["metrics"].keys() == {"accuracy", "loss"}
    answers = pipeline("fill-mask", output)("the quick [MASK] fox")
    assert len(answers) == 5 and all("score" in answer for answer in answers)
    states = pipeline("feature-extraction", output)("the quick fox")
    assert len(states[0][0]) == open_checkpoint(model).config.hidden_size
    ours = load_tokenizer(open_checkpoint(output))
    for theirs in (AutoTokenizer.from_pretrained(output, trust_remote_code=True), ours):
        assert type(theirs) is type(AutoTokenizer.from_pretrained(model)) and theirs.pad_token == "[PAD]"
        assert theirs("the fox", "the dog")["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]


def test_score_evaluate_sweep_and_report_of_a_classifier(run: CommandLine, tmp_path: Path) -> None:
    problem: Problem = "multi_label"
    model, data = saved_encoder(tmp_path / "model", problem), labelled_file(tmp_path / "data.jsonl", problem)
    scores = run("score", model, "--calibration", data, "--samples", 50, "--json")
    assert scores.code == 0, scores.err
    assert "(nats per example)" in json.loads(scores.out)["quantity"]
    directory = tmp_path / "sweep"
    arguments = (
        "--calibration",
        data,
        "--eval-data",
        data,
        "--samples",
        50,
        "--method",
        "remove",
        "--output",
        directory,
    )
    swept = run("sweep", model, "--target-layers", "4,3", *arguments)
    assert swept.code == 0, swept.err
    points = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))["points"]
    measured = [point["result"]["tasks"][str(data)]["metrics"]["loss"]["value"] for point in points]
    original = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))["original"]["tasks"][str(data)]
    ratios = [value / original["metrics"]["loss"]["value"] for value in measured]
    assert [point["loss_ratio"] for point in points] == pytest.approx(ratios)
    assert any("parameters" in point["fronts"] for point in points)
    for name in ("sweep.md", "sweep.csv", "report.html"):
        assert "perplexity" not in (directory / name).read_text(encoding="utf-8").lower(), name
    refused = run("sweep", model, "--target-layers", "4", "--best", "perplexity<=1.1x", *arguments, "--overwrite")
    assert refused.code == 2 and "--best bounds what is measured of causal language models" in refused.err
    saved = tmp_path / "output"
    removed = run("compress", model, "--layers", "2", "--method", "remove", "--no-eval", "--output", saved)
    assert removed.code == 0, removed.err
    evaluated = run("evaluate", saved, "--baseline", model, "--eval-data", data, "--json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["comparison"]["tasks"][str(data)].keys() == {
        *("exact_match", "f1_micro", "f1_macro", "loss")
    }
    assert run("report", saved).code == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "bundled is text without labels, but the model's head is a classifier"),
        (("--tasks", "bundled"), "--tasks need a causal language model, but"),
        (("--prompt", "the fox"), "--prompt need a causal language model, but"),
        (("--sequence-length", 8), "more than --sequence-length 8"),
        (("--window-overlap", 4), "--window-overlap divides long examples of a token classifier, but"),
    ],
)
def test_what_a_classifier_cannot_be_asked_is_refused(
    run: CommandLine, tmp_path: Path, options: tuple[Any, ...], expected: str
) -> None:
    model, data = saved_encoder(tmp_path / "model", "single_label"), labelled_file(tmp_path / "d.jsonl", "single_label")
    before = listing(tmp_path)
    given = ("--eval-data", data) if options else ()
    outcome = run("compress", model, "--calibration", data, *given, *CUT, *options, "--output", tmp_path / "output")
    assert outcome.code == 2 and expected in outcome.err and len(outcome.error_lines) <= 3
    assert listing(tmp_path) == before


def test_a_label_of_which_there_is_no_example_is_warned_of(run: CommandLine, tmp_path: Path) -> None:
    model, data = saved_encoder(tmp_path / "model", "tags"), labelled_file(tmp_path / "d.jsonl", "tags")
    outcome = run("score", model, "--calibration", data, "--samples", 50)
    assert outcome.code == 0 and f"none of the calibration examples has the label {TAGS[2]}" in outcome.err


def test_long_tagged_documents_are_measured_in_windows_as_whole_documents(run: CommandLine, tmp_path: Path) -> None:
    model, short = saved_encoder(tmp_path / "model", "tags"), labelled_file(tmp_path / "short.jsonl", "tags", rows=12)
    rows = [json.loads(line) for line in short.read_text(encoding="utf-8").splitlines()]
    long = tmp_path / "long.jsonl"
    long.write_text(
        "\n".join(json.dumps({name: 3 * row[name] for name in ("tokens", "tags")}) for row in rows), encoding="utf-8"
    )
    arguments = ("--eval-data", long, "--sequence-length", 24, "--json")
    refused = run("evaluate", model, *arguments)
    assert refused.code == 2 and "read them in overlapping windows with --window-overlap" in refused.err
    outcome = run("evaluate", model, *arguments, "--window-overlap", 8)
    assert outcome.code == 0, outcome.err
    assert re.search(r"evaluation: 12 examples of '.*' in \d\d windows", outcome.err)
    measured = json.loads(outcome.out)["model"]["tasks"][str(long)]
    assert measured["items"] == 12
    # Of a tag, nothing is lost or counted twice: the right ones are a whole number of all words.
    right = measured["metrics"]["accuracy"]["value"] * sum(3 * len(row["tokens"]) for row in rows)
    assert right == pytest.approx(round(right), abs=1e-6)


def test_models_with_other_heads_or_labels_are_not_compared(run: CommandLine, tmp_path: Path) -> None:
    one = saved_encoder(tmp_path / "one", "single_label")
    other = saved_encoder(tmp_path / "other", "single_label")
    edit_json(other / "config.json", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    data = labelled_file(tmp_path / "d.jsonl", "single_label")
    refused = run("evaluate", one, "--baseline", other, "--eval-data", data)
    assert refused.code == 2 and "label" in refused.err


def test_every_head_has_a_pipeline_and_an_auto_class() -> None:
    for head in HEADS.values():
        assert hasattr(transformers, head.auto_class)
        transformers.pipelines.check_task(head.pipeline)
