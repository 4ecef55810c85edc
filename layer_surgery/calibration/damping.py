"""Second moments that can be inverted."""

from torch import Tensor

from layer_surgery.errors import NumericalError
from layer_surgery.linalg.low_rank import shrunk


def damped(moment: Tensor, tokens: int, index: int, name: str) -> Tensor:
    """Return a second moment that can be inverted, float64. Raises `NumericalError`, naming layer and linear."""
    if not moment.isfinite().all():
        raise NumericalError(f"a second moment of '{name}' in layer {index} is not finite; try --dtype float32.")
    return shrunk(moment.double(), tokens)
