"""Low-rank factors as they are made: one safetensors file a linear, so that memory holds at most one layer's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from layer_surgery.errors import LayerSurgeryError, NumericalError
from layer_surgery.low_rank import Factors
from layer_surgery.tensors import SafetensorsSource


class FactorStore:
    """Factors of operated layers in a scratch directory, in the dtype of the checkpoint."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.directory, self.dtype = directory, dtype

    def write(self, index: int, factors: Mapping[str, Factors]) -> None:
        """Add factors, by linear, to layer `index`. Raises `NumericalError` if one is not finite.

        Every linear has a file of its own that is written once: a file that is mapped somewhere is never changed.
        """
        for name, (left, right) in factors.items():
            tensors: dict[str, Tensor] = {}
            for part, tensor in (("out_factor", left), ("in_factor", right)):
                stored = tensor.to("cpu", self.dtype).contiguous()
                if not torch.isfinite(stored).all():
                    raise NumericalError(f"the {part} of '{name}' in layer {index} is not finite in {self.dtype}.")
                tensors[f"{name}.{part}.weight"] = stored
            path = self.directory / f"{_prefix(index)}{name}.safetensors"
            if path.exists():
                raise ValueError(f"layer {index} has factors for '{name}' already")
            try:
                save_file(tensors, path)
            except (OSError, SafetensorError) as error:
                raise LayerSurgeryError(
                    f"the factors of layer {index} cannot be written to {self.directory} ({error}); is the disk full?"
                ) from error

    def source(self, index: int) -> SafetensorsSource:
        """Return the tensors of a layer, by their names within it, as a source to read from lazily."""
        return SafetensorsSource(sorted(self.directory.glob(f"{_prefix(index)}*.safetensors")))

    def read(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a layer by their names within it, on the CPU."""
        source = self.source(index)
        return source.read(source.specs, torch.device("cpu"))


def _prefix(index: int) -> str:
    return f"layer-{index:05d}-"
