"""Low-rank factors as they are made: one safetensors file a layer, so that memory never holds more than one layer's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layer_surgery.errors import NumericalError
from layer_surgery.low_rank import Factors
from layer_surgery.tensors import SafetensorsSource


class FactorStore:
    """Factors of operated layers in a scratch directory, in the dtype of the checkpoint."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.directory, self.dtype = directory, dtype
        self._layers: set[int] = set()

    def write(self, index: int, factors: Mapping[str, Factors]) -> None:
        """Add factors, by linear, to layer `index`. Raises `NumericalError` if one is not finite."""
        tensors: dict[str, Tensor] = self.read(index) if index in self._layers else {}
        for name, (left, right) in factors.items():
            for part, tensor in (("out_factor", left), ("in_factor", right)):
                stored = tensor.to("cpu", self.dtype).contiguous()
                if not torch.isfinite(stored).all():
                    raise NumericalError(f"the {part} of '{name}' in layer {index} is not finite in {self.dtype}.")
                tensors[f"{name}.{part}.weight"] = stored
        save_file(tensors, self._path(index))
        self._layers.add(index)

    def read(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a layer by their names within it, on the CPU."""
        return load_file(self._path(index))

    def source(self, index: int) -> SafetensorsSource:
        """Return the tensors of a layer as a source to read from lazily."""
        return SafetensorsSource([self._path(index)])

    def _path(self, index: int) -> Path:
        return self.directory / f"factors-{index:05d}.safetensors"
