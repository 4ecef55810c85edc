"""Long tagged examples in overlapping windows: nothing is lost, nothing is counted twice."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_encoders import encoder_tokenizer

from layer_surgery.data import pack_at_most, pack_calibration, pack_evaluation
from layer_surgery.data.documents import LoadedData, Tagged
from layer_surgery.data.objective import NO_LABEL, Objective
from layer_surgery.data.overlap import windows
from layer_surgery.errors import DataError
from layer_surgery.healing.windows import healing_data

TOKENIZER = encoder_tokenizer()
OBJECTIVE = Objective(problem="tags", labels=("O", "B-animal", "I-animal"), padding_id=0, longest=256)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "one", "two", "three", "foxes"]


def tagged(*lengths: int) -> LoadedData:
    """Return documents of so many words, whose tags say where a word stands."""
    documents = [
        Tagged([WORDS[place % len(WORDS)] for place in range(length)], [place % 3 for place in range(length)])
        for length in lengths
    ]
    return LoadedData("tagged", documents, "tagged")


def packed(data: LoadedData, **more: Any) -> Any:
    return pack_evaluation(data, TOKENIZER, objective=OBJECTIVE, **{"sequence_length": 16} | more)


@pytest.mark.parametrize(("length", "room", "overlap"), [(1, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 3), (51, 8, 0)])
def test_windows_answer_for_every_token_once_and_see_around_it(length: int, room: int, overlap: int) -> None:
    found = windows(length, room, overlap)
    assert [place for window in found for place in range(window.first, window.last)] == list(range(length))
    assert all(window.end - window.start == min(room, length) for window in found)
    assert all(first.end - second.start >= overlap for first, second in pairwise(found))
    for window in found:
        assert window.start == 0 or window.first - window.start >= overlap // 2
        assert window.end == length or window.end - window.last >= overlap // 2


def test_an_overlap_that_does_not_go_into_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens does not go into windows of 8"):
        windows(20, 8, 8)


def test_windows_have_each_tag_once_in_its_order() -> None:
    whole, cut = packed(tagged(3, 40, 17), sequence_length=512, overlap=0), packed(tagged(3, 40, 17), overlap=6)
    assert whole.sequence_length > 64 > cut.sequence_length == 16
    counts = cut.documents.bincount().tolist()
    assert len(counts) == 3 and counts[0] == 1 and counts[1] > counts[2] > 1
    for document in range(3):
        expected = whole.labels[document][whole.labels[document] != NO_LABEL]
        rows = cut.labels[cut.documents == document]
        assert torch.equal(rows[rows != NO_LABEL], expected)
    first, last = TOKENIZER.convert_tokens_to_ids("<bos>"), TOKENIZER.convert_tokens_to_ids("<eos>")
    for row, valid in zip(cut.token_ids, cut.valid, strict=True):
        assert row[valid][0] == first and row[valid][-1] == last
    # A window's tags are at the same tokens as in the whole document.
    assert sorted(
        zip(cut.token_ids[cut.loss_mask].tolist(), cut.labels[cut.loss_mask].tolist(), strict=True)
    ) == sorted(zip(whole.token_ids[whole.loss_mask].tolist(), whole.labels[whole.loss_mask].tolist(), strict=True))


def test_examples_that_fit_are_what_they_are_without_windows() -> None:
    assert packed(tagged(3, 4), overlap=6).sha256 == packed(tagged(3, 4)).sha256


def test_calibration_draws_windows() -> None:
    every = packed(tagged(40, 17), overlap=6)
    drawn = pack_calibration(
        tagged(40, 17), TOKENIZER, samples=5, seed=0, sequence_length=16, objective=OBJECTIVE, overlap=6
    )
    assert drawn.sequences == 5 < every.sequences
    assert {tuple(row) for row in drawn.token_ids.tolist()} <= {tuple(row) for row in every.token_ids.tolist()}
    with pytest.raises(DataError, match=f"fewer than --samples {every.sequences + 1}"):
        pack_calibration(
            tagged(40, 17),
            TOKENIZER,
            samples=every.sequences + 1,
            seed=0,
            sequence_length=16,
            objective=OBJECTIVE,
            overlap=6,
        )


def test_without_an_overlap_long_examples_are_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"overlapping windows with --window-overlap, or shorten .* nothing is cut off"):
        packed(tagged(40))
    with pytest.raises(
        DataError, match=r"--window-overlap is 8, but a window of 16 tokens has room for 14 .* 7 or less"
    ):
        packed(tagged(40), overlap=8)


@pytest.mark.parametrize("lengths", [[range(20, 40)], [range(20, 40), range(40, 60)], [(300, 310)]])
def test_no_document_is_trained_on_and_held_out(lengths: list[Any]) -> None:
    """Windows of one document share words and their tags: what was seen in one would be known in the next."""
    data, sources = [tagged(*each) for each in lengths], len(lengths)
    tokens = pack_at_most(
        data, [1.0] * sources, TOKENIZER, samples=999, sequence_length=16, seed=0, objective=OBJECTIVE, overlap=6
    )
    halves = healing_data(tokens, None, 0.0, seed=0)
    trained, held_out = (set(half.documents.tolist()) for half in (halves.train, halves.validation))  # type: ignore[union-attr]
    assert held_out and trained and not held_out & trained
    assert halves.train.sequences + halves.validation.sequences == tokens.sequences >= 40 * sources
    assert len(halves.texts) == 1 and halves.validation.sequences <= tokens.sequences // 2


def test_one_long_document_cannot_be_divided() -> None:
    options = {"samples": 99, "sequence_length": 16, "seed": 0, "overlap": 6}
    tokens = pack_at_most([tagged(300)], [1.0], TOKENIZER, objective=OBJECTIVE, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is one long example"):
        healing_data(tokens, None, 0.0, seed=0)
