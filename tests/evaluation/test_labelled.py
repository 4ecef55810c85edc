"""Accuracy, F1, correlation and their intervals, against definitions written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_encoders import labelled_tokens, own_loss, tiny_encoder
from tiny_models import settings, streamed

from layer_surgery.data.objective import NO_LABEL, Problem
from layer_surgery.evaluation.labelled import LabelOutcome, Measure, label_changes, label_outcome
from layer_surgery.evaluation.spans import is_span_tagging, spans
from layer_surgery.records import TaskResult


def naive_f1(given: np.ndarray, wanted: np.ndarray) -> float:
    hits, wrong, missed = (given & wanted).sum(), (given & ~wanted).sum(), (~given & wanted).sum()
    return float(2 * hits / (2 * hits + wrong + missed)) if hits else 0.0


def measured(
    problem: Problem, tmp_path: Path, names: tuple[str, ...] | None = None
) -> tuple[TaskResult, dict[str, float]]:
    """Return what is measured of a tiny model, and the same from the whole model's logits by definition."""
    model, tokens = tiny_encoder("bert", problem), labelled_tokens(problem, 30, 12)
    if names is not None:
        tokens = replace(tokens, objective=replace(tokens.objective, labels=names))
    found = label_outcome(streamed(model), tokens, settings(tmp_path, batch_size=7)).result(0)
    assert tokens.labels is not None
    with torch.no_grad():
        logits = model(**tokens.inputs(slice(0, 30))).logits
        expected = {"loss": float(own_loss(model, tokens))}
    given, wanted = logits.numpy(), tokens.labels.numpy()
    if problem == "regression":
        flat = np.corrcoef(given.ravel(), wanted.ravel())[0, 1]
        ranks = [np.argsort(np.argsort(values.ravel())) for values in (given, wanted)]
        return found, expected | {"pearson": flat, "spearman": np.corrcoef(*ranks)[0, 1]}
    if problem == "multi_label":
        chosen, right = given > 0, wanted > 0.5
        each = [naive_f1(chosen[:, label], right[:, label]) for label in range(3)]
        whole = {"f1_micro": naive_f1(chosen.ravel(), right.ravel()), "f1_macro": float(np.mean(each))}
        return found, expected | whole | {"exact_match": float((chosen == right).all(axis=1).mean())}
    answers = given.argmax(axis=-1)
    known = wanted != NO_LABEL
    expected |= {"accuracy": float((answers == wanted)[known].mean())}
    if problem == "tags" and names is not None:
        pairs = [
            (spans([names[k] for k in answers[n][known[n]]]), spans([names[k] for k in wanted[n][known[n]]]))
            for n in range(30)
        ]
        hits = sum(len(a & b) for a, b in pairs)
        return found, expected | {"span_f1": 2 * hits / sum(len(a) + len(b) for a, b in pairs)}
    if problem != "masked_token":
        labels = sorted({*wanted[known].tolist()})
        each = [naive_f1((answers == k) & known, (wanted == k) & known) for k in labels]
        expected |= {"f1_macro": float(np.mean(each))}
    return found, expected


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression", "tags", "masked_token"])
def test_measures_are_what_their_names_say(problem: Problem, tmp_path: Path) -> None:
    found, expected = measured(problem, tmp_path)
    assert found.items == 30
    assert {name: metric.value for name, metric in found.metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert list(found.metrics)[-1] == "loss" and not found.metrics["loss"].higher_is_better


def test_spans_are_measured_where_tags_are_those_of_spans(tmp_path: Path) -> None:
    found, expected = measured("tags", tmp_path, ("O", "B-x", "I-x"))
    assert {name: metric.value for name, metric in found.metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert expected["span_f1"] > 0


def test_windows_of_a_document_are_one_example(tmp_path: Path) -> None:
    """Of ten documents in three windows each: what is counted is what their tags, put together, come to."""
    names = ("O", "B-x", "I-x")
    model, tokens = tiny_encoder("bert", "tags"), labelled_tokens("tags", 30, 12)
    tokens = replace(
        tokens, objective=replace(tokens.objective, labels=names), documents=torch.arange(10).repeat_interleave(3)
    )
    found = label_outcome(streamed(model), tokens, settings(tmp_path, batch_size=7)).result(0)
    assert tokens.labels is not None and tokens.documents is not None
    with torch.no_grad():
        answers = model(**tokens.inputs(slice(0, 30))).logits.argmax(dim=-1)
        loss = float(own_loss(model, tokens))
    hits = both = 0
    for document in range(10):
        rows = tokens.documents == document
        known = tokens.labels[rows] != NO_LABEL
        given, wanted = (spans([names[tag] for tag in tags[rows][known].tolist()]) for tags in (answers, tokens.labels))
        hits, both = hits + len(given & wanted), both + len(given) + len(wanted)
    assert found.items == 10
    assert found.metrics["span_f1"].value == pytest.approx(2 * hits / both)
    assert found.metrics["loss"].value == pytest.approx(loss, abs=1e-6)
    alone = label_outcome(streamed(model), replace(tokens, documents=None), settings(tmp_path, batch_size=7)).result(0)
    assert alone.items == 30 and alone.metrics["span_f1"].value != found.metrics["span_f1"].value


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-a I-a O", {(1, 3, "a")}),
        ("B-a B-a I-b", {(0, 1, "a"), (1, 2, "a"), (2, 3, "b")}),
        ("I-a I-a O I-b", {(0, 2, "a"), (3, 4, "b")}),
        ("B-a I-b I-b", {(0, 1, "a"), (1, 3, "b")}),
        ("S-a B-b I-b E-b I-b", {(0, 1, "a"), (1, 4, "b"), (4, 5, "b")}),
        ("O O", set()),
    ],
)
def test_spans(tags: str, expected: set[tuple[int, int, str]]) -> None:
    assert spans(tags.split()) == expected


def test_tags_of_spans_are_told_from_others() -> None:
    assert is_span_tagging(["O", "B-PER", "I-PER"])
    assert not is_span_tagging(["NOUN", "VERB"]) and not is_span_tagging(["O"]) and not is_span_tagging(["O", "B-"])


def outcome(correct: np.ndarray) -> LabelOutcome:
    sums = np.stack([correct, np.ones_like(correct)], axis=1)
    return LabelOutcome({"accuracy": Measure(sums, lambda s: s[..., 0] / s[..., 1])}, len(correct))


def test_errors_are_those_of_means_and_pairs_take_out_what_examples_have_in_common() -> None:
    generator = np.random.default_rng(0)
    before = (generator.random(400) < 0.7).astype(float)
    after = before.copy()
    after[np.flatnonzero(before)[:8]] = 0
    found = outcome(before).result(0).metrics["accuracy"]
    assert found.value == pytest.approx(before.mean())
    assert found.stderr == pytest.approx(before.std() / 20, rel=0.05)
    change = label_changes(outcome(before), outcome(after), 0)["accuracy"]
    assert change.value == pytest.approx(-0.02) and change.pairs == 400
    assert change.low == pytest.approx(-0.035, abs=0.004) and change.high == pytest.approx(-0.0075, abs=0.004)
    none = label_changes(outcome(before), outcome(before), 0)["accuracy"]
    assert (none.low, none.value, none.high) == (0, 0, 0)
    assert label_changes(outcome(before[:1]), outcome(before[:1]), 0) == {}
