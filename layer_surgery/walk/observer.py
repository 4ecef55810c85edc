"""What sees the layers of a walk as they pass: statistics, scores and surgery are observers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from layer_surgery.journal import Finished, Steps
from layer_surgery.walk.boundaries import Boundary


class Observer:
    """Sees every layer as the walk passes. Reduces on the spot; holds nothing of the size of the data."""

    def watching(self, index: int, layer: nn.Module) -> AbstractContextManager[None]:
        """Entered before the first micro-batch of layer `index`, left after its last: hooks go in, hooks come out."""
        return nullcontext()

    def begin_backward(self, gradient: Boundary) -> None:
        """Backward walk only, before its first layer: where the gradient after each layer is while it is watched."""

    def batch(self, valid: Tensor) -> None:
        """Before each micro-batch: which of its tokens are no padding, [B, S] bool on the device."""

    def end_round(self, present: int) -> None:
        """After each round, in which the first `present` processes have had a micro-batch: sums go to their owners."""

    def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
        """Forward walk only: hidden states [B, S, D] at both sides of layer `index`; `valid` [B, S] bool."""

    def finish(self, index: int, steps: Steps, passing: Callable[[Path], object]) -> None:
        """Behind layer `index`, in a walk that can go on after it was stopped: finish the step `str(index)`, with all
        that `restore` needs."""
        raise NotImplementedError

    def restore(self, index: int, step: Finished) -> None:
        """In the place of a layer that an earlier run has finished."""
        raise NotImplementedError
