"""Numbers that have left the range of their dtype, noticed where they do and said so."""

import torch
from torch import Tensor

from layer_surgery import parallel
from layer_surgery.errors import NumericalError
from layer_surgery.walk.streamed import StreamedModel


class Finite:
    """Looks whether values stay finite, micro-batch by micro-batch, and asks the device for the answer only once."""

    def __init__(self, model: StreamedModel, what: str) -> None:
        """Look at `what`, as an error calls it, of a model."""
        self._model, self._what = model, what
        self._finite: Tensor | None = None

    def see(self, values: Tensor, valid: Tensor) -> None:
        """Look at values [B, S, D] of the tokens that are no padding (`valid`, [B, S] bool)."""
        finite = (torch.isfinite(values) | ~valid[..., None]).all()
        self._finite = finite if self._finite is None else self._finite & finite

    def check(self) -> None:
        """Raise `NumericalError`, in all processes alike, if something that one of them has seen is not finite."""
        if not all(parallel.gather(self._finite is None or bool(self._finite))):
            raise not_finite(self._model, self._what)


def not_finite(model: StreamedModel, what: str) -> NumericalError:
    """Return the error for values that are not finite."""
    dtype = str(model.dtype).removeprefix("torch.")
    return NumericalError(f"{what} of {model.checkpoint.name} are not finite in {dtype}; {remedy(model.dtype)}.")


def remedy(dtype: torch.dtype) -> str:
    """Return what a user can do where numbers of a dtype are not finite."""
    if dtype == torch.float16:
        return "numbers above 65,504 overflow in it: take --dtype bfloat16 or --dtype float32"
    if dtype == torch.bfloat16:
        return "take --dtype float32, and check the checkpoint's weights"
    return "check the checkpoint's weights: some may be far too large"
