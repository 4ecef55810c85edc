"""Head and losses in chunks: equal to the plain way, and no logits of all tokens."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layer_surgery.healing.head import HeadLoss, chunked_head_loss
from layer_surgery.healing.losses import TeacherLogits, TokenLogits
from layer_surgery.healing.mixture import parse_losses, token_values

N, D, V = 11, 6, 13
LOSSES = parse_losses(["kl:0.7", "ce:0.3:smoothing=0.1"])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case:
    """Hidden states, a head that caps its logits, a teacher and weights."""

    def __init__(self) -> None:
        self.hidden = random(N, D, seed=0).requires_grad_()
        self.linear = nn.Linear(D, V, bias=True).double()
        self.teacher = TeacherLogits(random(N, V, seed=1).log_softmax(dim=1))
        self.labels = torch.arange(N) % V
        self.token_weights = torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.weights = torch.tensor([loss.weight for loss in LOSSES], dtype=torch.float64)
        self.largest = 0

    def head(self, hidden: Tensor) -> Tensor:
        self.largest = max(self.largest, len(hidden))
        return 5 * torch.tanh(self.linear(hidden) / 5)

    def losses(self, logits: Tensor, rows: slice) -> Tensor:
        teacher = replace(self.teacher, log_probs=self.teacher.log_probs[rows])
        return token_values(LOSSES, TokenLogits(logits, teacher, self.labels[rows]))

    def plain(self) -> HeadLoss:
        values = self.losses(self.head(self.hidden), slice(0, N))
        return HeadLoss((self.weights[:, None] * values * self.token_weights).sum(), values.detach())

    def chunked(self, size: int, **changes: Any) -> HeadLoss:
        arguments: dict[str, Any] = {
            "weights": self.weights,
            "token_weights": self.token_weights,
            "parameters": list(self.linear.parameters()),
        }
        return chunked_head_loss(self.hidden, self.head, self.losses, **arguments | changes, tokens_at_a_time=size)

    def gradients(self, total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, [self.hidden, *self.linear.parameters()]))


@pytest.mark.parametrize("size", [1, 4, N, 100])
def test_chunks_give_what_the_plain_way_gives(size: int) -> None:
    case = Case()
    expected = case.plain()
    case.largest = 0
    found = case.chunked(size)
    assert case.largest == min(size, N)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.values, expected.values)
    assert not found.values.requires_grad
    for one, other in zip(case.gradients(3 * found.total), case.gradients(3 * expected.total), strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_is_that_of_the_total() -> None:
    case = Case()

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        case.hidden = hidden
        return chunked_head_loss(
            hidden,
            lambda x: x @ weight.T,
            case.losses,
            weights=case.weights,
            token_weights=case.token_weights,
            parameters=[weight],  # type: ignore[list-item]
            tokens_at_a_time=3,
        ).total

    weight = random(V, D, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(total, (case.hidden, weight))


def test_a_frozen_head_gets_no_gradient_and_evaluation_makes_none() -> None:
    case = Case()
    case.linear.requires_grad_(False)
    total = case.chunked(4).total
    total.backward()
    assert case.hidden.grad is not None and case.linear.weight.grad is None
    with torch.no_grad():
        found = case.chunked(4)
    assert not found.total.requires_grad
    torch.testing.assert_close(found.total, total.detach())


def test_logits_of_a_chunk_are_gone_when_those_of_the_next_are_there() -> None:
    case, seen = Case(), list[weakref.ref[Tensor]]()
    losses = case.losses

    def watched(logits: Tensor, rows: slice) -> Tensor:
        assert all(earlier() is None for earlier in seen)
        seen.append(weakref.ref(logits))
        return losses(logits, rows)

    case.losses = watched  # type: ignore[method-assign]
    total = case.chunked(4).total
    assert len(seen) == 3 and all(each() is None for each in seen)
    total.backward()


def test_gradients_of_16_bit_heads_are_summed_in_32_bits() -> None:
    ones = 4096
    hidden, linear = torch.ones(ones, 1, dtype=torch.bfloat16), nn.Linear(1, 1, bias=False).bfloat16()
    total = chunked_head_loss(
        hidden,
        linear,
        lambda logits, rows: logits.T,
        weights=torch.ones(1),
        token_weights=torch.ones(ones),
        parameters=list(linear.parameters()),
        tokens_at_a_time=1,
    ).total
    total.backward()
    # In bfloat16 the sum of ones stays at 256.
    assert linear.weight.grad is not None and float(linear.weight.grad) == ones


def test_no_tokens_have_no_loss() -> None:
    case = Case()
    case.hidden = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    found = case.chunked(4, token_weights=torch.zeros(0))
    found.total.backward()
    assert float(found.total.detach()) == 0 and found.values.shape == (2, 0)
    with pytest.raises(ValueError, match="tokens_at_a_time is 0"):
        case.chunked(0)
