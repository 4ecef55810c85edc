"""The sum of losses that a student is trained on: which, with which weights and options, as users write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from layer_surgery.disk.reading import parse_json, read_bytes, why
from layer_surgery.errors import UserError
from layer_surgery.healing.losses import LOSSES, PER_TOKEN, LossEntry, TokenLogits
from layer_surgery.healing.losses.registry import as_number

#: Bytes of a file of losses at most.
_FILE_BYTES = 1_000_000
_FORM = "write NAME, NAME:WEIGHT or NAME:WEIGHT:OPTION=VALUE,OPTION=VALUE, or name a .yaml or .json file"


@dataclass(frozen=True)
class WeightedLoss:
    """A loss with its weight in the sum, and the options that differ from its defaults."""

    entry: LossEntry
    weight: float
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def settings(self) -> dict[str, float]:
        """All of the loss's options."""
        return self.entry.options | dict(self.options)

    def value(self, inputs: Any) -> Tensor:
        """Return the loss of what it needs (`LossEntry.needs`), without its weight: [n], one a token, or a mean []."""
        own = {name: value for name, value in self.options.items() if name not in self.entry.arranged}
        return self.entry.function(inputs, **own)

    def to_dict(self) -> dict[str, Any]:
        return {"loss": self.name, "weight": self.weight, "source": self.entry.source, **self.settings}


def parse_losses(texts: Sequence[str]) -> tuple[WeightedLoss, ...]:
    """Return the losses that users ask for, in their order.

    Args:
        texts: each `NAME`, `NAME:WEIGHT` (1 unless given) or `NAME:WEIGHT:OPTION=VALUE,...`; or a `.yaml`, `.yml` or
            `.json` file with an object of weights by name, or of objects with `weight` and options by name.

    Raises `UserError`: an unknown name or option, a number out of range, a name twice, a file that cannot be read.
    """
    if not texts:
        raise UserError(f"--loss is empty; {_FORM}.")
    losses = [loss for text in texts for loss in (_from_file(text) if _is_file(text) else [_from_text(text)])]
    names = [loss.name for loss in losses]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--loss has '{twice}' more than once; give each loss once, with the sum of its weights.")
    return tuple(losses)


def token_values(losses: Sequence[WeightedLoss], tokens: TokenLogits) -> Tensor:
    """Return each loss of a chunk of tokens, without weights [losses, n]; of losses with a value for each token."""
    if any(loss.entry.needs not in PER_TOKEN for loss in losses):
        raise ValueError("only losses over logits and labels have a value for each token")
    return torch.stack([loss.value(tokens) for loss in losses])


def _is_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json"))


def _from_text(text: str) -> WeightedLoss:
    name, _, rest = text.partition(":")
    weight, _, options = rest.partition(":")
    pairs = [pair.partition("=") for pair in options.split(",")] if options else []
    malformed = next(("".join(pair) for pair in pairs if not (pair[0].strip() and pair[1] and pair[2])), None)
    if malformed is not None:
        raise UserError(f"--loss {text}: '{malformed}' is no OPTION=VALUE; {_FORM}.")
    return _loss(name.strip(), weight or 1.0, {key.strip(): value for key, _, value in pairs}, f"--loss {text}")


def _from_file(text: str) -> list[WeightedLoss]:
    path, place = Path(text).expanduser(), f"--loss {text}"
    try:
        content = read_bytes(path, _FILE_BYTES)
        data = parse_json(content) if path.suffix == ".json" else yaml.safe_load(content)
    except OSError as error:
        raise UserError(f"{place} cannot be read ({why(error)}).") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place} is no {path.suffix.removeprefix('.').upper()} ({reason}).") from error
    if not isinstance(data, dict) or not data:
        raise UserError(f"{place} must have an object of losses by name, as in 'kl: 1'.")
    losses = []
    for name, value in data.items():
        options = dict(value) if isinstance(value, dict) else {"weight": value}
        losses.append(_loss(str(name), options.pop("weight", 1.0), options, place))
    return losses


def _loss(name: str, weight: Any, options: Mapping[str, Any], place: str) -> WeightedLoss:
    try:
        entry = LOSSES[name]
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    number = as_number(weight)
    if number is None or not 0 < number < float("inf"):
        raise UserError(f"{place}: the weight of '{name}' is {weight!r}; allowed: a number above 0.")
    return WeightedLoss(entry, number, entry.check(options, place))
