"""The head and the losses over its logits, in chunks of tokens: logits of all tokens never exist.

With a large vocabulary the matrices of tokens x vocabulary (logits, log-probabilities, their gradients, the teacher's)
are most of the memory of training. Here the gradient with respect to the hidden states, and to the head's parameters
where they are trained, is computed in the forward pass, one chunk after the other; the backward pass only scales it.
Liger Kernel (https://arxiv.org/abs/2410.10989) fuses the same for cross-entropy; this takes any loss.

Shapes: n tokens that carry loss, D hidden, V vocabulary, m losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Head = Callable[[Tensor], Tensor]
"""From hidden states [c, D] to logits [c, V]; a module, or a function that also caps or scales logits."""
ChunkLosses = Callable[[Tensor, slice], Tensor]
"""From logits [c, V] of a chunk, float32 or better, and its place among the n tokens, to [m, c] losses."""


class HeadLoss(NamedTuple):
    """The weighted sum of losses over all tokens, and what it is made of."""

    total: Tensor  # [] with graph: sum over losses and tokens of weight * token weight * loss
    values: Tensor  # [m, n] each loss of each token, without weights or graph


def chunked_head_loss(
    hidden: Tensor,
    head: Head,
    losses: ChunkLosses,
    *,
    weights: Tensor,
    token_weights: Tensor,
    parameters: Sequence[nn.Parameter] = (),
    tokens_at_a_time: int,
) -> HeadLoss:
    """Return losses over the logits of hidden states, of which only `tokens_at_a_time` exist at a time.

    The total has a gradient for the hidden states and for `parameters`, once: it cannot be differentiated twice. The
    gradients of parameters are summed in float32 or better.

    Args:
        hidden: [n, D], what the head reads: after the final norm.
        head: is called with a chunk of them.
        losses: of a chunk; the chunks come in order.
        weights: [m] of the losses.
        token_weights: [n]; one that divides by the tokens of the whole optimiser step makes the total a mean over them.
        parameters: of the head, those that are trained.
        tokens_at_a_time: tokens of a chunk, at least 1.
    """
    if tokens_at_a_time < 1:
        raise ValueError(f"tokens_at_a_time is {tokens_at_a_time}; allowed: 1 or more")
    plan = _Plan(head, losses, weights.detach(), token_weights.detach(), tokens_at_a_time, torch.is_grad_enabled())
    return HeadLoss(*_ChunkedHeadLoss.apply(plan, hidden, *parameters))  # type: ignore[no-untyped-call]


class _Plan(NamedTuple):
    head: Head
    losses: ChunkLosses
    weights: Tensor
    token_weights: Tensor
    tokens_at_a_time: int
    grad_enabled: bool  #: Of the caller: inside a function of autograd it is always off.


class _ChunkedHeadLoss(torch.autograd.Function):
    """The total and the values; saves gradients instead of what they are computed from."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [hidden.requires_grad, *(each.requires_grad for each in parameters)]
        gradients: list[Tensor | None] = [
            torch.zeros_like(each, dtype=_wide(each) if position else each.dtype)
            if plan.grad_enabled and want
            else None
            for position, (each, want) in enumerate(zip([hidden, *parameters], wanted, strict=True))
        ]
        total, values = torch.zeros((), dtype=torch.float64, device=hidden.device), []
        for start in range(0, len(hidden), plan.tokens_at_a_time):
            chunk = slice(start, min(start + plan.tokens_at_a_time, len(hidden)))
            chunk_total, chunk_values = _chunk(plan, hidden, parameters, chunk, gradients)
            total += chunk_total
            values.append(chunk_values)
        ctx.gradients, ctx.dtypes = gradients, [each.dtype for each in (hidden, *parameters)]
        result = torch.cat(values, dim=1) if values else hidden.new_zeros((len(plan.weights), 0))
        ctx.mark_non_differentiable(result)
        return total.to(_wide(hidden)), result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, total: Tensor, _values: Tensor) -> tuple[Tensor | None, ...]:
        return (
            None,
            *(
                None if gradient is None else (gradient * total.to(gradient.dtype)).to(dtype)
                for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
            ),
        )


def _chunk(
    plan: _Plan, hidden: Tensor, parameters: Sequence[Tensor], chunk: slice, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Return the total [] and the values [m, c] of a chunk; add its gradients to those that are not None."""
    wanted = [gradient is not None for gradient in gradients]
    with torch.set_grad_enabled(any(wanted)):
        piece = hidden[chunk].detach().requires_grad_(wanted[0])
        logits = plan.head(piece)
        values = plan.losses(logits.to(_wide(logits)), chunk)
        total = (values * plan.weights[:, None].to(values) * plan.token_weights[chunk].to(values)).sum()
    inputs = [each for each, want in zip([piece, *parameters], wanted, strict=True) if want]
    if inputs and total.requires_grad:
        found = iter(torch.autograd.grad(total, inputs, allow_unused=True))
        for position, gradient in enumerate(gradients):
            part = next(found) if gradient is not None else None
            if gradient is not None and part is not None:
                (gradient[chunk] if position == 0 else gradient).add_(part)
    return total.detach().double(), values.detach()


def _wide(tensor: Tensor) -> torch.dtype:
    """Return float32, or float64 for a tensor of it."""
    return torch.promote_types(tensor.dtype, torch.float32)
