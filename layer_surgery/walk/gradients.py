"""Weight gradients that are summed outside the parameters, in float32 or better."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from layer_surgery.parallel import Sums


@contextmanager
def accumulated_gradients(weights: Mapping[str, nn.Parameter], sums: Sums | None = None) -> Iterator[dict[str, Tensor]]:
    """Within the block, every backward pass adds the gradients of `weights` to the yielded tensors.

    The sums are float32 (float64 for float64 weights), whatever the dtype of computation, and the parameters' own
    `.grad` stays empty. On exit the hooks are gone and the parameters need no gradient again. With several processes
    they are the totals of `sums`, whose rounds the caller ends: an owner's are there after the last.
    """
    sums = sums or Sums()
    for name, parameter in weights.items():
        # A weight that no backward pass reaches has a gradient of 0.
        sums.term(name, parameter.shape, _like(parameter))

    def add(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            sums.term(name, parameter.shape, _like(parameter)).add_(parameter.grad)
            parameter.grad = None

    hooks = []
    try:
        for name, parameter in weights.items():
            parameter.requires_grad_(True)
            hook = partial(add, name)
            hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        yield sums.totals
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in weights.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def _like(parameter: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device)
