"""The text of a healing: what is trained on, and what is only watched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from layer_surgery.data.objective import Objective
from layer_surgery.data.tokens import PackedTokens, joined
from layer_surgery.errors import DataError
from layer_surgery.walk.losses import targets

#: One window in so many is held out, at least `LEAST_HELD_OUT` and at most `MOST_HELD_OUT`.
HELD_OUT = 8
LEAST_HELD_OUT, MOST_HELD_OUT = 2, 64
#: Of labelled examples and of single texts, which say less each, at most so many are held out.
MOST_EXAMPLES_HELD_OUT = 512
#: A window of general text is trained on at most so many times in each pass over the data.
MOST_REPEATS = 4


@dataclass(frozen=True, kw_only=True)
class HealingData:
    """Windows of one length."""

    train: PackedTokens  #: The data first, then general text.
    order: Tensor  #: [n] int64: the windows of one pass over `train`; general ones may stand there several times.
    data_windows: int  #: How many of `train` are of the data.
    validation: PackedTokens  #: Held out from the data.
    watched: PackedTokens | None  #: Held out from the general text.

    @property
    def general_windows(self) -> int:
        """Windows of general text in one pass."""
        return int((self.order >= self.data_windows).sum())

    @property
    def texts(self) -> dict[str, PackedTokens]:
        """The texts that are not trained on, by name."""
        return {"validation": self.validation} | ({"general": self.watched} if self.watched is not None else {})

    def first(self, count: int) -> HealingData:
        """Return the same with only the first `count` windows of the data, and as many fewer of the general text."""
        if count >= self.data_windows:
            return self
        general = self.train.select(slice(self.data_windows, None))
        share = self.general_windows / self.data_windows
        return _arranged(self.train.select(slice(0, count)), general, share, self.validation, self.watched)


def healing_data(tokens: PackedTokens, general: PackedTokens | None, share: float, seed: int) -> HealingData:
    """Divide text into what is trained on and what is held out. All windows of a document are on one side.

    Args:
        tokens: the data, in an order that is random already.
        general: general text in its own order, if any is to be trained on.
        share: windows of general text for each window of the data.
        seed: of the choice of general windows.

    Raises `DataError` if too few windows would be left.
    """
    held_out = _held_out(tokens)
    if held_out.all():
        raise DataError(
            f"'{tokens.name}' is one long example, of which no window can be held out that is like no other; pass more."
        )
    if int(held_out.sum()) < LEAST_HELD_OUT:
        kind = "examples" if tokens.objective.labelled else "texts" if tokens.objective.apart else None
        found = (
            f"has {tokens.sequences} {kind}"
            if kind is not None
            else f"makes {tokens.sequences} sequences of {tokens.sequence_length} tokens"
        )
        advice = f"more {kind}" if kind is not None else "more text, or lower --sequence-length"
        raise DataError(
            f"'{tokens.name}' {found}, too few to hold some out and train on the rest, which takes "
            f"{HELD_OUT * LEAST_HELD_OUT}; pass {advice}."
        )
    watched = None
    if general is not None:
        order = torch.randperm(general.sequences, generator=torch.Generator().manual_seed(seed))
        apart = min(MOST_HELD_OUT, general.sequences // HELD_OUT)
        watched = general.select(order[:apart]) if apart else None
        general = general.select(order[apart:])
    return _arranged(tokens.select(~held_out), general, share, tokens.select(held_out), watched)


def most_held_out(objective: Objective) -> int:
    """Return how many sequences are held out at most."""
    return MOST_EXAMPLES_HELD_OUT if objective.apart else MOST_HELD_OUT


def _held_out(tokens: PackedTokens) -> Tensor:
    """Return which sequences [N] bool are held out: the first ones.

    Windows of one document share text, so of documents all are, as many documents as it takes.
    """
    count = min(most_held_out(tokens.objective), tokens.sequences // HELD_OUT)
    if tokens.documents is None:
        return torch.arange(tokens.sequences) < count
    found = torch.zeros(tokens.sequences, dtype=torch.bool)
    for document in dict.fromkeys(tokens.documents.tolist()):
        if int(found.sum()) >= count:
            break
        found |= tokens.documents == document
    return found


def _arranged(
    data: PackedTokens,
    general: PackedTokens | None,
    share: float,
    validation: PackedTokens,
    watched: PackedTokens | None,
) -> HealingData:
    count = data.sequences
    order = torch.arange(count)
    if general is not None and general.sequences:
        repeated = min(round(share * count), MOST_REPEATS * general.sequences)
        order = torch.cat([order, count + torch.arange(repeated) % general.sequences])
        data = joined(f"{data.name} + {general.name}", [data, general.select(slice(0, repeated))])
    return HealingData(train=data, order=order, data_windows=count, validation=validation, watched=watched)


def passes(order: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` windows: passes over those of `order` [n], each in an order of its own that the seed chooses.

    Every step of the optimiser takes the next ones of these, so what a step sees depends neither on the number of
    processes nor on how it is divided, and no step at the end of a pass is shorter than others.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [order[torch.randperm(len(order), generator=generator)] for _ in range(-(-count // len(order)))]
    return torch.cat(found)[:count]


def by_length(order: Tensor, lengths: Tensor, step: int) -> Tensor:
    """Return the windows of `order` [n] with those of each step, of so many, from the shortest to the longest.

    So a micro-batch holds windows of about one length, and little of it is padding; what a step sees stays the same.

    Args:
        lengths: [N] tokens of each window that are no padding.
        step: windows of a step of the optimiser; divides n.
    """
    steps = order.view(-1, step)
    return steps.gather(1, lengths[steps].argsort(dim=1, stable=True)).flatten()


def training_order(data: HealingData, steps: int, step_sequences: int, seed: int) -> Tensor:
    """Return the windows [steps x step_sequences] of a training, step after step."""
    order = passes(data.order, steps * step_sequences, seed)
    return by_length(order, data.train.valid.sum(dim=1), step_sequences)


class WindowDataset(Dataset[int]):
    """Numbers of windows, for a data loader; `collate` turns them into a batch."""

    def __init__(self, tokens: PackedTokens, order: Tensor) -> None:
        self.tokens, self.order = tokens, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> int:
        return int(self.order[position])

    def collate(self, windows: Sequence[int]) -> dict[str, Tensor]:
        """Return what the model is called with, each [B, S] int64, `labels` (see `targets`), and `windows` [B] int64;
        where windows may share rows, their `lengths` [B] too.

        Columns at the end that are padding in all of them are left out, as examples are of different lengths.
        """
        rows = torch.tensor(list(windows))
        lengths = self.tokens.valid[rows].sum(dim=1)
        length = int(lengths.max())
        labels = targets(self.tokens, rows)
        given = {name: tensor[:, :length] for name, tensor in self.tokens.inputs(rows).items()}
        if self.tokens.objective.problem == "next_token":
            given["lengths"] = lengths
        return given | {
            "labels": labels if self.tokens.objective.of_sequences else labels[:, :length],
            "windows": rows,
        }
