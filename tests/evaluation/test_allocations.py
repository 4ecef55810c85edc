"""The peak of what a block allocates, counted by hand."""

from __future__ import annotations

import torch

from layer_surgery.evaluation.allocations import Allocations

MEGABYTE = 1 << 20


def block(megabytes: int) -> torch.Tensor:
    return torch.zeros(megabytes * MEGABYTE, dtype=torch.uint8)


def test_the_peak_is_the_most_at_a_time_and_not_the_sum() -> None:
    with Allocations() as allocations:
        a = block(3)
        b = block(2)
        del a
        c = block(4)
        del b, c
        block(5)
    assert allocations.peak_bytes == 6 * MEGABYTE


def test_views_and_in_place_operations_take_nothing() -> None:
    with Allocations() as allocations:
        a = block(3)
        a.view(3, -1)[1:].add_(1)
    assert allocations.peak_bytes == 3 * MEGABYTE


def test_what_was_there_before_does_not_count() -> None:
    before = block(7)
    with Allocations() as allocations:
        view = before[: 2 * MEGABYTE]
        copy = view.clone()
        del before, view
    assert allocations.peak_bytes == copy.nbytes == 2 * MEGABYTE


def test_a_freed_address_that_is_used_again_counts_again() -> None:
    with Allocations() as allocations:
        for _ in range(5):
            block(2)
        held = [block(2) for _ in range(3)]
    assert allocations.peak_bytes == sum(tensor.nbytes for tensor in held)
