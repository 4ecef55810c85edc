"""Labelled texts, tagged words and masked text: what a model is given, what it is to answer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import encoder_tokenizer
from tiny_tokenizer import tiny_tokenizer

from layer_surgery.data import load_documents, pack_calibration, pack_evaluation, pack_mixture
from layer_surgery.data.documents import Labelled, LoadedData, Tagged, Text, Wanted
from layer_surgery.data.labelled import count_labels
from layer_surgery.data.objective import NO_LABEL, Objective, Problem
from layer_surgery.errors import CheckpointError, DataError

TOKENIZER = encoder_tokenizer()
BOS, EOS, PAD = (TOKENIZER.convert_tokens_to_ids(token) for token in ("<bos>", "<eos>", "<pad>"))


def objective(problem: Problem, **fields: Any) -> Objective:
    names = ("O", "B-animal", "I-animal") if problem == "tags" else ("no", "maybe", "yes")
    given = {"labels": () if problem == "masked_token" else names, "padding_id": PAD, "longest": 64} | fields
    return Objective(problem=problem, **given)


def rows_file(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def labelled(*pairs: tuple[str, object]) -> LoadedData:
    return LoadedData("data", [Labelled(text, label) for text, label in pairs], "labelled")


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids)


# Columns


def test_columns_of_labels_pairs_and_tags(tmp_path: Path) -> None:
    texts = rows_file(tmp_path / "a.jsonl", {"text": "a", "label": "yes"}, {"text": "b", "label": 0})
    assert load_documents(texts, part="calibration", wanted="labels").documents == [
        Labelled("a", "yes"),
        Labelled("b", 0),
    ]
    pairs = rows_file(tmp_path / "b.jsonl", {"sentence1": "a", "sentence2": "b", "score": 0.5})
    assert load_documents(pairs, part="calibration", wanted="labels").documents == [Labelled("a", 0.5, "b")]
    tags = rows_file(tmp_path / "c.jsonl", {"tokens": ["a", "fox"], "ner_tags": [0, "B-animal"]})
    assert load_documents(tags, part="calibration", wanted="tags").documents == [Tagged(["a", "fox"], [0, "B-animal"])]
    (tmp_path / "d.csv").write_text("body,label\nthe fox,2\n", encoding="utf-8")
    loaded = load_documents(str(tmp_path / "d.csv"), column="body", part="calibration", wanted="labels")
    assert loaded.documents == [Labelled("the fox", "2")]


@pytest.mark.parametrize(
    ("wanted", "row", "expected"),
    [
        ("labels", {"text": "a"}, "needs text, or sentence1 and sentence2, together with label or labels or score"),
        ("labels", {"text": "a", "label": ""}, "line 1: the field 'label' is missing or empty"),
        ("tags", {"text": "a"}, "needs tokens together with tags or ner_tags"),
        ("tags", {"tokens": ["a", "b"], "tags": [0]}, "2 tokens have 1 tags"),
        ("tags", {"tokens": "a b", "tags": [0, 1]}, "the field 'tokens' must be a list"),
        ("tags", {"tokens": ["a", ""], "tags": [0, 1]}, "the field 'tokens' is empty"),
    ],
)
def test_rows_without_what_is_wanted_are_refused(tmp_path: Path, wanted: Wanted, row: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_documents(rows_file(tmp_path / "a.jsonl", row), part="calibration", wanted=wanted)


@pytest.mark.parametrize("wanted", ["labels", "tags"])
def test_text_without_labels_is_refused(tmp_path: Path, wanted: Wanted) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    for source in ("bundled", str(tmp_path / "a.txt")):
        with pytest.raises(DataError, match=f"is text without {wanted}, but the model's head is a classifier"):
            load_documents(source, part="evaluation", wanted=wanted)


# Labels


@pytest.mark.parametrize(
    ("problem", "given", "expected"),
    [
        ("single_label", ["yes", 0, "1", 2.0, True], [2, 0, 1, 2, 1]),
        ("multi_label", [["yes", 0], [], "maybe"], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        ("multi_label", [[1.0, 0.0, 1.0], [False, False, True]], [[1, 0, 1], [0, 0, 1]]),
        ("regression", [[1, "2", 0.5], [0, 0, -1]], [[1, 2, 0.5], [0, 0, -1]]),
    ],
)
def test_labels_by_name_and_by_number(problem: Problem, given: list[Any], expected: list[Any]) -> None:
    data = labelled(*(("the fox", label) for label in given))
    packed = pack_evaluation(data, TOKENIZER, sequence_length=16, objective=objective(problem))
    assert packed.labels is not None
    assert packed.labels.tolist() == expected
    assert packed.labels.dtype == (torch.int64 if problem == "single_label" else torch.float32)
    assert packed.loss_mask.sum(dim=1).tolist() == [1] * len(given)


@pytest.mark.parametrize(
    ("problem", "label", "expected"),
    [
        ("single_label", "yeah", r"example 1: the label 'yeah' is none of the head's 3 .* Did you mean 'yes'"),
        ("single_label", 3, "the label 3 is none of the head's 3"),
        ("single_label", -1, "the label -1 is none"),
        ("single_label", 0.5, "the label 0.5 is none"),
        ("single_label", ["yes"], 'set "problem_type": "multi_label_classification"'),
        ("multi_label", ["yes", "nope"], "the label 'nope' is none"),
        ("multi_label", [0, 1, 0], "may be numbers of labels, or 0 or 1 for each of the head's 3"),
        ("regression", "high", "is not a list of 3 numbers"),
        ("regression", [1.0, 2.0], "is not a list of 3 numbers"),
        ("regression", [1.0, 2.0, float("nan")], "is not a list of 3 numbers"),
    ],
)
def test_labels_that_the_head_does_not_have_are_refused(problem: Problem, label: object, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        pack_evaluation(labelled(("a", label)), TOKENIZER, sequence_length=16, objective=objective(problem))


def test_both_of_two_labels_are_not_taken_for_no_and_yes() -> None:
    two = objective("multi_label", labels=("no", "yes"))
    for label, expected in ([0, 1], None), ([0.0, 1.0], [0, 1]), (["no", "yes"], [1, 1]), ([1], [0, 1]):
        data = labelled(("a", label))
        if expected is None:
            with pytest.raises(DataError, match="write each label once, by its name, or true or false"):
                pack_evaluation(data, TOKENIZER, sequence_length=16, objective=two)
            continue
        labels = pack_evaluation(data, TOKENIZER, sequence_length=16, objective=two).labels
        assert labels is not None and labels.tolist() == [expected]


# Packing


def test_each_text_is_a_sequence_padded_to_the_longest() -> None:
    texts = ["the quick brown fox", "one", "the lazy dog"]
    data = labelled(*((text, "yes") for text in texts))
    packed = pack_evaluation(data, TOKENIZER, sequence_length=40, objective=objective("single_label"))
    rows = [[BOS, *ids_of(text), EOS] for text in texts]
    assert packed.sequence_length == max(map(len, rows))
    for row, expected in enumerate(rows):
        assert packed.token_ids[row][packed.valid[row]].tolist() == expected
        assert set(packed.token_ids[row][~packed.valid[row]].tolist()) <= {PAD}
    inputs = packed.inputs(slice(1, 3))
    assert torch.equal(inputs["attention_mask"], packed.valid[1:3].long()) and "token_type_ids" not in inputs


def test_of_two_texts_the_model_is_told_which_is_which() -> None:
    data = LoadedData("pairs", [Labelled("the fox", "no", "one two")], "labelled")
    packed = pack_evaluation(data, TOKENIZER, sequence_length=40, objective=objective("single_label"))
    first, second = [BOS, *ids_of("the fox"), EOS], [*ids_of("one two"), EOS]
    assert packed.token_ids[0].tolist() == first + second
    assert packed.inputs(slice(0, 1))["token_type_ids"][0].tolist() == [0] * len(first) + [1] * len(second)


def test_the_first_token_of_each_word_has_its_tag() -> None:
    words = ["the", "quick", "foxes", "jumps"]
    data = LoadedData("tagged", [Tagged(words, ["O", 0, "B-animal", "I-animal"])], "tagged")
    packed = pack_evaluation(data, TOKENIZER, sequence_length=40, objective=objective("tags"))
    assert packed.labels is not None
    expected = [NO_LABEL]
    for number, (word, label) in enumerate(zip(words, (0, 0, 1, 2), strict=True)):
        pieces = ids_of(f" {word}" if number else word)
        expected += [label] + [NO_LABEL] * (len(pieces) - 1)
    assert packed.labels[0].tolist() == [*expected, NO_LABEL]
    assert torch.equal(packed.loss_mask, packed.labels != NO_LABEL)
    assert int(packed.loss_mask.sum()) == len(words) < len(expected) - 1


def test_a_word_without_a_tag_carries_no_loss() -> None:
    data = LoadedData("tagged", [Tagged(["the", "fox"], [NO_LABEL, "B-animal"])], "tagged")
    packed = pack_evaluation(data, TOKENIZER, sequence_length=40, objective=objective("tags"))
    assert packed.labels is not None
    assert packed.labels[packed.loss_mask].tolist() == [1]


def test_texts_that_do_not_fit_are_refused_and_never_cut_off() -> None:
    data = labelled(("one", 0), (" ".join(["fox"] * 30), 1))
    with pytest.raises(DataError, match=r"example 2 has \d+ tokens, more than --sequence-length 8 .* raise"):
        pack_evaluation(data, TOKENIZER, sequence_length=8, objective=objective("single_label"))
    with pytest.raises(DataError, match=r"more than the 8 that the model takes .* nothing is cut off"):
        pack_evaluation(data, TOKENIZER, sequence_length=256, objective=objective("single_label", longest=8))


def test_a_classifier_that_cannot_tell_padding_is_refused() -> None:
    data = labelled(("one", 0), ("two", 1))
    with pytest.raises(CheckpointError, match="no pad_token_id"):
        pack_evaluation(data, TOKENIZER, sequence_length=8, objective=objective("single_label", padding_id=None))


def test_calibration_draws_examples_by_the_seed_and_mixes_sources() -> None:
    data = labelled(*((f"fox {number}", number % 3) for number in range(30)))
    longer = labelled(*((f"the quick brown fox jumps over {number}", 2) for number in range(30)))
    arguments: dict[str, Any] = {"sequence_length": 40, "objective": objective("single_label")}
    first, again, other = (pack_calibration(data, TOKENIZER, samples=12, seed=seed, **arguments) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert len({tuple(row) for row in first.token_ids.tolist()}) == 12
    with pytest.raises(DataError, match="data has 30 examples, fewer than --samples 31; lower --samples to at most 30"):
        pack_calibration(data, TOKENIZER, samples=31, seed=0, **arguments)
    mixed = pack_mixture([data, longer], [1, 2], TOKENIZER, samples=9, seed=0, **arguments)
    assert mixed.labels is not None and mixed.sequences == 9 and mixed.objective.problem == "single_label"
    long = (mixed.valid.sum(dim=1) > first.sequence_length).nonzero().flatten()
    assert len(long) == 6 and mixed.labels[long].tolist() == [2] * 6
    assert count_labels(mixed).sum() == 9


def test_other_labels_or_segments_are_other_data() -> None:
    same = objective("single_label")
    packed = [
        pack_evaluation(labelled(("the fox", label)), TOKENIZER, sequence_length=16, objective=same) for label in (0, 1)
    ]
    assert packed[0].sha256 != packed[1].sha256


# Masked text


def test_masked_windows_have_each_token_of_the_text_once() -> None:
    text = " ".join(str(number) for number in range(300))
    data = LoadedData("text", [Text(text)], "text")
    packed = pack_evaluation(data, TOKENIZER, sequence_length=16, objective=objective("masked_token"), seed=1)
    assert packed.labels is not None
    chosen = packed.labels != NO_LABEL
    original = torch.where(chosen, packed.labels, packed.token_ids)
    stream = [token for row, valid in zip(original, packed.valid, strict=True) for token in row[valid].tolist()[1:-1]]
    assert stream == ids_of(text)
    assert all(row[valid].tolist()[0] == BOS for row, valid in zip(packed.token_ids, packed.valid, strict=True))
    assert not (chosen & ~packed.valid).any() and not chosen[:, 0].any()
    share = float(chosen.sum()) / len(stream)
    masked = float((packed.token_ids[chosen] == TOKENIZER.mask_token_id).float().mean())
    left = float((packed.token_ids[chosen] == packed.labels[chosen]).float().mean())
    assert 0.12 < share < 0.18 and 0.7 < masked < 0.9 and 0.03 < left < 0.2
    again = pack_evaluation(data, TOKENIZER, sequence_length=16, objective=objective("masked_token"), seed=1)
    other = pack_evaluation(data, TOKENIZER, sequence_length=16, objective=objective("masked_token"), seed=2)
    assert packed.sha256 == again.sha256 != other.sha256


def test_masked_calibration_needs_text_and_a_mask_token() -> None:
    data = LoadedData("text", [Text("one two three " * 50)], "text")
    arguments: dict[str, Any] = {"samples": 2, "seed": 0, "objective": objective("masked_token")}
    packed = pack_calibration(data, TOKENIZER, sequence_length=16, **arguments)
    assert packed.valid.all() and packed.sequences == 2
    with pytest.raises(CheckpointError, match="no mask token"):
        pack_calibration(data, tiny_tokenizer(), sequence_length=16, **arguments)
    with pytest.raises(DataError, match="puts 2 tokens around"):
        pack_calibration(data, TOKENIZER, sequence_length=2, **arguments)
    with pytest.raises(DataError, match="is so short that no token"):
        pack_evaluation(
            LoadedData("text", [Text("a")], "text"), TOKENIZER, sequence_length=16, objective=objective("masked_token")
        )
    with pytest.raises(DataError, match="calibrated on texts"):
        pack_calibration(labelled(("a", 0)), TOKENIZER, sequence_length=16, **arguments)
