"""The vectors of texts of many lengths: padding costs little, and counts for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_embedders import saved_embedder, text_tokens
from tiny_models import settings, streamed

from layer_surgery.errors import NumericalError
from layer_surgery.evaluation.vectors import alike_in_length, text_vectors
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk

#: Of 1 to 33 words, the longest neither first nor last.
TEXTS = [" ".join(["the quick brown fox"] * count) for count in (1, 3, 8, 1, 2)] + ["dog", "one two three"] * 4


def test_vectors_are_those_of_all_texts_padded_to_the_longest(tmp_path: Path) -> None:
    model = streamed(saved_embedder(tmp_path / "model", layers=2), dtype=torch.float64)
    tokens = text_tokens(model.checkpoint.objective, TEXTS)
    with Walk(model, tokens, settings(tmp_path)) as walk:
        padded = walk.embeddings(walk.forward(range(model.layer_count), keep=False))
    torch.testing.assert_close(text_vectors(model, tokens, settings(tmp_path, batch_size=2)), padded)


def test_most_of_the_padding_is_not_walked_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(saved_embedder(tmp_path / "model", layers=2))
    tokens = text_tokens(model.checkpoint.objective, TEXTS)
    walked = list[int]()

    def noted(walk: Walk, _model: StreamedModel, given: object, _settings: object) -> None:
        original(walk, _model, given, _settings)
        walked.append(walk.tokens.token_ids.numel())

    original = Walk.__init__
    monkeypatch.setattr(Walk, "__init__", noted)
    text_vectors(model, tokens, settings(tmp_path, batch_size=2))
    assert len(walked) > 1
    assert tokens.valid.sum() <= sum(walked) < tokens.token_ids.numel() / 2


def test_groups_hold_each_text_once_with_room_for_it() -> None:
    lengths = torch.tensor([3, 120, 60, 61, 20, 9, 64, 1, 119])
    groups = [(rows.tolist(), length) for rows, length in alike_in_length(lengths, fewest=2)]
    assert groups == [([1, 8, 6, 3], 120), ([2, 4], 60), ([5, 0, 7], 9)]


def test_a_text_without_direction_has_the_number_that_its_user_gave_it(tmp_path: Path) -> None:
    model = streamed(saved_embedder(tmp_path / "model", layers=2))
    tokens = text_tokens(model.checkpoint.objective, TEXTS)
    found, original = list[int](), Walk.embeddings

    def without_the_longest(walk: Walk, last: object) -> torch.Tensor:
        vectors = original(walk, last)
        vectors[walk.tokens.valid.sum(dim=1) == tokens.valid.sum(dim=1).max()] = 0
        found.append(len(vectors))
        return vectors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "embeddings", without_the_longest)
        with pytest.raises(NumericalError, match="the first is text 3"):
            text_vectors(model, tokens, settings(tmp_path, batch_size=2))
    assert len(found) > 1
