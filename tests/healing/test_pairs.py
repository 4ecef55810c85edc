"""Pairs of layers follow from what survives."""

from __future__ import annotations

import pytest

from layer_surgery.healing.pairs import layer_pairs
from layer_surgery.records import LayerPlan, SurgeryPlan


def test_a_layer_stands_for_all_that_comes_before_its_successor() -> None:
    # Layers 2, 3 and 6 of eight are gone: the student's layer 1 is original layer 1, and its successor is layer 4.
    assert layer_pairs([0, 1, 4, 5, 7], depth=8) == [(0, 0), (1, 3), (2, 4), (3, 6), (4, 7)]


def test_the_last_layer_stands_for_the_last_and_the_first_for_what_the_second_reads() -> None:
    assert layer_pairs([2, 5], depth=9) == [(0, 4), (1, 8)]
    assert layer_pairs([4], depth=5) == [(0, 4)]


def test_narrowed_and_low_rank_layers_stand_for_themselves_and_removed_ones_do_not() -> None:
    layers = [
        LayerPlan(index=0, action="keep"),
        LayerPlan(index=1, action="low_rank", ranks={"mlp.up_proj": 2}),
        LayerPlan(index=2, action="remove"),
        LayerPlan(index=3, action="reduce", channels=3),
    ]
    plan = SurgeryPlan(method="mix", target_layers=1, layers=layers)
    assert layer_pairs(plan.surviving, len(plan.layers)) == [(0, 0), (1, 2), (2, 3)]


@pytest.mark.parametrize("surviving", [[], [1, 0], [0, 0], [-1, 0], [0, 4]])
def test_what_is_no_choice_of_layers_is_refused(surviving: list[int]) -> None:
    with pytest.raises(ValueError, match="no layers of 4 in ascending order"):
        layer_pairs(surviving, depth=4)
