"""The sizes that memory, disk and time follow from. Read from the skeleton of a checkpoint; nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.experts import Experts, experts_of
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.linalg.decomposition import Decomposition
from layer_surgery.runs.session import Session


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """One decoder layer."""

    parameters: int
    largest: int  #: Elements of its largest tensor.
    linears: dict[str, tuple[int, int]]  #: (out, in), by name.
    groups: tuple[tuple[str, ...], ...]  #: Linears that read one input.
    units: dict[str, int]  #: Output projections, with how many of their inputs are cut together.
    experts: Experts | None

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for layers of equal sizes."""
        return self.parameters, tuple(self.linears.items()), self.experts is not None

    @property
    def widths(self) -> int:
        """Numbers a token has at the inputs and outputs of all linears that it goes through."""
        dense = sum(out + in_ for out, in_ in self.linears.values())
        return dense + (self.experts.chosen * 4 * self.experts.count if self.experts is not None else 0)

    @property
    def moment_elements(self) -> int:
        """Elements of the second moments: of every input once, and of the gradient at every output."""
        inputs = sum(self.linears[group[0]][1] ** 2 for group in self.groups)
        outputs = sum(out**2 for out, _in in self.linears.values())
        if self.experts is None:
            return inputs + outputs
        each = self.experts.count**2 + self.experts.hidden**2
        return inputs + outputs + self.experts.number * each


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A checkpoint and the data that a run goes over. All bytes are of computation where they are not of files."""

    layers: tuple[LayerSizes, ...]
    outside: int  #: Parameters of embeddings, final norm and head.
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    stored_itemsize: int
    batch_size: int
    length: int  #: Tokens of a calibration sequence.
    calibration: int  #: Sequences.
    general: int  #: Sequences of general text that a refit looks at.
    texts: tuple[tuple[int, int], ...]  #: Sequences and length of every evaluation text.
    decomposition: Decomposition
    resident_bytes: int
    boundary_bytes: int
    ahead_bytes: int  #: For a layer that is read ahead.

    @property
    def batch_tokens(self) -> int:
        """Tokens of a micro-batch, of calibration or of evaluation."""
        return self.batch_size * max([self.length, *(length for _count, length in self.texts)])

    @property
    def stay(self) -> bool:
        """Whether all layers stay in memory after their first use."""
        return sum(layer.parameters for layer in self.layers) * self.dtype.itemsize <= self.resident_bytes

    @property
    def layer_bytes(self) -> int:
        """Weights of layers that are in memory at a time: all, if they stay, else the largest as it is read."""
        itemsize = self.dtype.itemsize
        if self.stay:
            return sum(layer.parameters for layer in self.layers) * itemsize
        largest, wider = max(layer.parameters for layer in self.layers), max(itemsize, self.stored_itemsize)
        ahead = largest * itemsize if 2 * largest * wider <= self.ahead_bytes else 0
        return ahead + largest * (itemsize + (self.stored_itemsize if self.stored_itemsize != itemsize else 0))

    def slot_bytes(self, sequences: int, length: int) -> int:
        """Hidden states at one boundary."""
        return sequences * length * self.hidden * self.dtype.itemsize

    def boundaries(self, slots: int, sequences: int, length: int) -> tuple[int, int]:
        """Return bytes in memory and on disk of so many boundaries of one store."""
        slot = self.slot_bytes(sequences, length)
        held = min(slots, self.boundary_bytes // slot) if slot else 0
        return held * slot, (slots - held) * slot

    def with_(self, **changes: object) -> Sizes:
        """Return the same with other settings."""
        return replace(self, **changes)  # type: ignore[arg-type]


def layer_sizes(checkpoint: Checkpoint) -> tuple[LayerSizes, ...]:
    """Return the sizes of every layer."""
    names, found = checkpoint.architecture, list[LayerSizes]()
    heads = getattr(checkpoint.config, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else 0
    for layer in checkpoint.layers:
        shapes = {
            name: (module.out_features, module.in_features)
            for name, module in layer.named_modules()
            if name in names.linears and isinstance(module, nn.Linear)
        }
        units = {names.mlp[-1]: 1} if names.mlp and names.mlp[-1] in shapes else {}
        if names.attention and names.attention[-1] in shapes and heads:
            units[names.attention[-1]] = max(1, shapes[names.attention[-1]][1] // heads)
        groups = [
            tuple(name for name in part[:-1] if name in shapes and shapes[name][1] == shapes[part[0]][1])
            for part in (names.attention, names.mlp)
            if part and part[0] in shapes
        ]
        known = {name for group in groups for name in group}
        groups += [(name,) for name in shapes if name not in known]
        elements = [parameter.numel() for parameter in layer.parameters()]
        found.append(
            LayerSizes(
                parameters=sum(elements),
                largest=max(elements, default=0),
                linears=shapes,
                groups=tuple(group for group in groups if group),
                units=units,
                experts=experts_of(layer),
            )
        )
    return tuple(found)


def sizes_of(
    session: Session, texts: Iterable[PackedTokens], *, length: int, calibration: int = 0, general: int = 0
) -> Sizes:
    """Return the sizes of a session's checkpoint, and of data that a run goes over.

    Args:
        texts: for perplexity and distance.
        length: tokens of a calibration sequence.
        calibration: sequences.
        general: sequences of general text that a refit looks at.
    """
    checkpoint, layers = session.checkpoint, layer_sizes(session.checkpoint)
    return Sizes(
        layers=layers,
        outside=checkpoint.parameters - sum(layer.parameters for layer in layers),
        hidden=checkpoint.hidden_size,
        vocabulary=checkpoint.vocabulary_size,
        dtype=session.dtype,
        stored_itemsize=checkpoint.dtype.itemsize,
        batch_size=session.runtime.batch_size,
        length=length,
        calibration=calibration,
        general=general,
        texts=sequences_of(texts),
        decomposition=session.runtime.decomposition,
        resident_bytes=session.resident_bytes,
        boundary_bytes=session.boundary_bytes,
        ahead_bytes=session.ahead_bytes,
    )


def sequences_of(tokens: Iterable[PackedTokens]) -> tuple[tuple[int, int], ...]:
    """Return the number of sequences and the length of each of some texts."""
    return tuple((each.sequences, each.sequence_length) for each in tokens)
