"""The module that Trainer trains: what a whole student and a single layer have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.data.objective import NO_LABEL, Objective
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.disk.reading import check_regular
from layer_surgery.errors import LayerSurgeryError
from layer_surgery.healing.adapters import plain_name

#: File of the trained parameters in a checkpoint of a training; Trainer looks for this name.
WEIGHTS_FILE = "model.safetensors"


@dataclass
class Sums:
    """Sums of each loss over the items since the last `take`."""

    losses: dict[str, Tensor] = field(default_factory=dict)  # by name, scalars on the device
    tokens: int = 0  # that carry loss; sequences, where there is one answer for each

    def add(self, name: str, total: Tensor) -> None:
        self.losses[name] = self.losses.get(name, torch.zeros_like(total)) + total.detach()

    def take(self) -> tuple[dict[str, float], int]:
        """Return the mean of each loss and the number of items, of all processes together, and begin anew."""
        own = {name: float(total) for name, total in self.losses.items()}
        found = parallel.gather([own, self.tokens])
        count = sum(tokens for _, tokens in found)
        totals = {name: sum(losses.get(name, 0.0) for losses, _ in found) for losses, _ in found for name in losses}
        self.losses, self.tokens = {}, 0
        return {name: total / max(1, count) for name, total in totals.items()}, count


class Trainee(nn.Module, ABC):
    """A module whose `forward` returns the loss of a micro-batch, divided by the items of the optimiser's step.

    Items are tokens that carry loss, or sequences where there is one answer for each. Its losses since the last
    validation are in `sums`. `model` is what has the parameters.
    """

    accepts_loss_kwargs = True  # Trainer then counts the labels of the whole step and hands the number on
    _keys_to_ignore_on_save = None  # Trainer looks for it when a checkpoint lacks weights, as ours lack untrained ones
    model: nn.Module
    objective: Objective

    def __init__(self) -> None:
        super().__init__()
        self.sums = Sums()

    @abstractmethod
    def measure(self, text: str, tokens: PackedTokens, batch_size: int) -> float:
        """Return what validation looks at: nats per item, on the text that is called `text`, less is better."""

    def items(self, labels: Tensor) -> Tensor:
        """Return how many items each window [B] has."""
        if self.objective.of_sequences:
            return torch.ones(len(labels), dtype=torch.int64, device=labels.device)
        return (labels != NO_LABEL).sum(dim=1)

    def step_items(self, labels: Tensor, counted: Tensor | int | None) -> Tensor | float:
        """Return how many items a step has, in which Trainer has counted so many numbers that are labels.

        A sequence may have several. Without a count, the items of `labels` alone.
        """
        if counted is None:
            return max(1, int(self.items(labels).sum()))
        numbers = labels.shape[1] if self.objective.of_sequences and labels.dim() == 2 else 1
        return counted / numbers

    def unfreeze(self, names: Collection[str]) -> int:
        """Have the named parameters of the model trained, as copies in float32; return how many numbers are trained."""
        return unfrozen(self.model, names)

    def save(self, directory: Path) -> Path:
        """Write the parameters that are trained into a directory, and return the file; the first process does."""
        if parallel.is_first():
            trained = {name: value.detach().cpu() for name, value in self.named_parameters() if value.requires_grad}
            try:
                directory.mkdir(parents=True, exist_ok=True)
                save_file(trained, directory / WEIGHTS_FILE)
            except (OSError, SafetensorError) as error:
                raise LayerSurgeryError(
                    f"the weights of the training cannot be written to {directory} ({' '.join(str(error).split())}); "
                    "make room, or give --checkpoints elsewhere."
                ) from error
        return directory / WEIGHTS_FILE

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Put what `save` wrote back, when all processes are here.

        Raises `LayerSurgeryError` if that is not there any more, or of other parameters.
        """
        parallel.barrier()
        parameters = {name: value for name, value in self.named_parameters() if value.requires_grad}
        try:
            check_regular(file)
            stored = load_file(file)
        except (OSError, SafetensorError) as error:
            raise LayerSurgeryError(
                f"the weights of the training in {file} cannot be read again ({' '.join(str(error).split())})."
            ) from error
        if {name: value.shape for name, value in stored.items()} != {n: value.shape for n, value in parameters.items()}:
            raise LayerSurgeryError(f"{file} has the weights of another training.")
        for name, tensor in stored.items():
            parameters[name].copy_(tensor)


def unfrozen(model: nn.Module, names: Collection[str]) -> int:
    """Have the named parameters of a module trained, as copies in float32; return how many of its numbers are."""
    count = 0
    for name, parameter in model.named_parameters():
        if plain_name(name) in names:
            # A copy: the tensor may be shared with a model of the user's.
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            parameter.requires_grad_(True)
        count += parameter.numel() if parameter.requires_grad else 0
    return count
