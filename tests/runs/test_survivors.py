"""Which layers of a removal order are taken when not every layer can go."""

from __future__ import annotations

import torch
from tiny_encoders import tiny_encoder
from tiny_models import streamed, tiny_model

from layer_surgery.runs.survivors import first_removable


def test_a_layer_that_no_other_can_take_the_place_of_is_passed_over() -> None:
    """The first layer of ModernBERT has no norm before its attention."""
    model, notes = streamed(tiny_encoder("modernbert", "masked_token"), dtype=torch.float32), list[str]()
    count = model.layer_count
    order = [0, *range(count - 1, 0, -1)]
    assert first_removable(model, order, 2, notes.append) == order[1:3]
    (note,) = notes
    assert note.startswith(f"layers [0, {count - 1}] count least, but others would change")
    assert first_removable(model, order[1:], 1, notes.append) == order[1:2]
    assert len(notes) == 1


def test_what_cannot_go_at_all_is_left_to_be_refused_with_the_reason() -> None:
    model, notes = streamed(tiny_encoder("modernbert", "masked_token"), dtype=torch.float32), list[str]()
    assert first_removable(model, [0], 1, notes.append) == [0]
    assert notes == []


def test_of_equal_layers_the_first_go() -> None:
    model, notes = streamed(tiny_model()), list[str]()
    assert first_removable(model, [0, 3, 1, 2], 2, notes.append) == [0, 3]
    assert notes == []
