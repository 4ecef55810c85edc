"""New tensors of layers as surgery makes them: one safetensors file a linear, written when it is ready."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from layer_surgery.checkpoint.modeling_layer_surgery import IN_FACTOR, OUT_FACTOR
from layer_surgery.checkpoint.tensors import SafetensorsSource
from layer_surgery.errors import LayerSurgeryError, NumericalError
from layer_surgery.linalg.low_rank import Factors


class FactorStore:
    """Factors (or whole new weights) of layers in a scratch directory, in the dtype of the checkpoint."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.directory, self.dtype = directory, dtype

    def write(self, index: int, factors: Mapping[str, Factors]) -> None:
        """Add factors, by linear, to layer `index`. Raises `NumericalError` if one is not finite."""
        for name, (left, right) in factors.items():
            self.write_tensors(index, name, {OUT_FACTOR: left, IN_FACTOR: right})

    def write_tensors(self, index: int, linear: str, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors of one linear, by their names within it, such as `weight`.

        Every linear has a file of its own that is written once: a file that is mapped somewhere is never changed.
        """
        stored: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            stored[f"{linear}.{name}"] = converted = tensor.to("cpu", self.dtype).contiguous()
            if not torch.isfinite(converted).all():
                raise NumericalError(
                    f"the {name.removesuffix('.weight')} of '{linear}' in layer {index} is not finite in {self.dtype}."
                )
        path = self.directory / f"{_prefix(index)}{linear}.safetensors"
        if path.exists():
            raise ValueError(f"layer {index} has new tensors for '{linear}' already")
        try:
            save_file(stored, path)
        except (OSError, SafetensorError) as error:
            raise LayerSurgeryError(
                f"the new tensors of layer {index} cannot be written to {self.directory} ({error}); is the disk full?"
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
