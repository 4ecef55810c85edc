"""Windows that are trained on and windows that are held out; examples that do not see each other."""

from __future__ import annotations

import pytest
import torch
from tiny_models import packed_tokens
from tiny_tokenizer import tiny_tokenizer

from layer_surgery.data import Example, LoadedData, pack_at_most
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.errors import DataError
from layer_surgery.healing.windows import MOST_REPEATS, WindowDataset, by_length, healing_data, passes


def test_what_is_held_out_is_not_trained_on() -> None:
    tokens, general = packed_tokens(33, 12), packed_tokens(17, 12, seed=3)
    data = healing_data(tokens, general, 0.25, seed=0)
    assert data.validation.sequences == 4 and data.data_windows == 29
    assert torch.equal(torch.cat([data.validation.token_ids, data.train.token_ids[:29]]), tokens.token_ids)
    assert data.watched is not None and data.watched.sequences == 2
    trained = {tuple(row) for row in data.train.token_ids.tolist()}
    for text in data.texts.values():
        assert trained.isdisjoint(map(tuple, text.token_ids.tolist()))
    assert data.general_windows == 7 and sorted(data.order.tolist()) == list(range(36))


def test_little_general_text_is_repeated_a_few_times_only() -> None:
    data = healing_data(packed_tokens(160, 12), packed_tokens(3, 12, seed=3), 1.0, seed=0)
    counts = torch.bincount(data.order)
    assert counts[: data.data_windows].tolist() == [1] * data.data_windows
    assert counts[data.data_windows :].tolist() == [MOST_REPEATS] * 3


def test_the_first_windows_keep_the_share_of_general_text() -> None:
    data = healing_data(packed_tokens(88, 12), packed_tokens(40, 12, seed=3), 0.25, seed=0)
    few = data.first(20)
    assert (few.data_windows, few.general_windows) == (20, 5)
    assert torch.equal(few.train.token_ids[:20], data.train.token_ids[:20])
    assert torch.equal(few.train.token_ids[20:], data.train.token_ids[77:82])
    assert data.first(1000) is data


def test_too_few_windows_are_refused() -> None:
    with pytest.raises(DataError, match="makes 15 sequences of 12 tokens, too few"):
        healing_data(packed_tokens(15, 12), None, 0.0, seed=0)


def test_each_example_has_a_window_of_its_own_and_batches_are_as_wide_as_their_longest() -> None:
    documents = [Example("one two", "the answer " * (1 + number % 3)) for number in range(24)]
    tokens = pack_at_most(
        [LoadedData("task", documents, "example")],
        [1.0],
        tiny_tokenizer(),
        samples=99,
        sequence_length=64,
        seed=0,
        alone=True,
    )
    assert tokens.sequences == 24
    lengths = tokens.valid.sum(dim=1)
    assert len(set(lengths.tolist())) == 3 and int(lengths.max()) < 64
    batch = WindowDataset(tokens, torch.arange(24)).collate([0, 1, 2, 3, 4])
    assert batch["input_ids"].shape == batch["labels"].shape == (5, int(lengths[:5].max()))
    assert int((batch["labels"] != NO_LABEL).sum()) == int(tokens.loss_mask[:5].sum())
    # a prompt carries no loss: its first label is the first token of the answer
    assert bool((batch["labels"][:, 0] == NO_LABEL).all())


def test_passes_see_every_window_as_often_and_each_in_an_order_of_its_own() -> None:
    order = torch.tensor([0, 1, 2, 3, 3])  # one of general text, twice
    found = passes(order, 13, seed=1)
    first, second, rest = found[:5], found[5:10], found[10:]
    assert first.sort().values.tolist() == second.sort().values.tolist() == [0, 1, 2, 3, 3]
    assert first.tolist() != second.tolist() and len(rest) == 3
    assert torch.equal(found, passes(order, 13, seed=1)) and not torch.equal(found, passes(order, 13, seed=2))


def test_windows_of_one_length_come_together_within_their_step() -> None:
    lengths = torch.tensor([9, 2, 8, 3, 5, 5, 1, 7])
    order = torch.tensor([0, 1, 2, 3, 4, 7, 6, 5])
    found = by_length(order, lengths, 4)
    assert found.tolist() == [1, 3, 2, 0, 6, 4, 5, 7]

    def computed(windows: torch.Tensor) -> int:
        return int(2 * lengths[windows].view(-1, 2).max(dim=1).values.sum())  # micro-batches of two

    assert computed(found) == 2 * (3 + 9 + 5 + 7) < computed(order)
