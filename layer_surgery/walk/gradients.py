"""Weight gradients that are summed outside the parameters, in float32 or better."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def accumulated_gradients(weights: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Within the block, every backward pass adds the gradients of `weights` to the yielded tensors.

    The sums are float32 (float64 for float64 weights), whatever the dtype of computation, and the parameters' own
    `.grad` stays empty. On exit the hooks are gone and the parameters need no gradient again.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in weights.items()}

    def add(total: Tensor, parameter: Tensor) -> None:
        if parameter.grad is not None:
            total.add_(parameter.grad)
            parameter.grad = None

    hooks = []
    try:
        for name, parameter in weights.items():
            parameter.requires_grad_(True)
            hook = partial(add, sums[name])
            hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in weights.values():
            parameter.requires_grad_(False)
            parameter.grad = None
