"""Queries, keys and values of a layer: which of its linears give them, and where in their outputs they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from layer_surgery.errors import CheckpointError

if TYPE_CHECKING:
    from layer_surgery.checkpoint.checkpoint import Checkpoint

#: Last parts of the names of linears that give queries, keys and values, one each.
_APART = tuple(tuple(f"{letter}{end}" for letter in "qkv") for end in ("_proj", "_lin", "")) + tuple(
    tuple(f"{name}{end}" for name in ("query", "key", "value")) for end in ("_proj", "")
)


@dataclass(frozen=True)
class QueriesKeysValues:
    """Where a layer has its queries, keys and values, before positions are turned into them."""

    linears: tuple[str, ...]  #: Relative to the layer: three, or one that gives all.
    widths: tuple[int, int, int]  #: Of the queries of all heads, of the keys, of the values.
    groups: int = 1  #: One linear gives, for so many groups of heads, queries and then keys and then values.

    @contextmanager
    def seen(self, layer: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Within the block, the outputs of these linears are put into what is yielded whenever the layer runs."""
        found: dict[str, Tensor] = {}

        def take(name: str, _linear: nn.Module, _inputs: Any, output: Tensor) -> None:
            found[name] = output

        hooks = [layer.get_submodule(name).register_forward_hook(partial(take, name)) for name in self.linears]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def joined(self, seen: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """Return queries, keys and values side by side, each of all heads, [B, S, sum of the widths].

        Args:
            seen: as `seen` yields it.
            shape: (B, S) of the hidden states: some layers flatten them.
        """
        outputs = [seen[name].reshape(*shape, -1) for name in self.linears]
        if len(outputs) > 1:
            return torch.cat(outputs, dim=-1)
        by_group = rearrange(outputs[0], "b s (group width) -> b s group width", group=self.groups)
        parts = torch.split(by_group, [width // self.groups for width in self.widths], dim=-1)
        return torch.cat([rearrange(part, "b s group width -> b s (group width)") for part in parts], dim=-1)

    def split(self, joined: Tensor) -> tuple[Tensor, ...]:
        """Return the queries, keys and values that `joined` has put side by side."""
        return torch.split(joined, list(self.widths), dim=-1)


def queries_keys_values(checkpoint: Checkpoint, position: int) -> QueriesKeysValues:
    """Return where a layer has its queries, keys and values.

    Raises `CheckpointError` where linears do not give them, or give something else too that cannot be told apart, as
    a gate beside the queries.
    """
    layer, architecture = checkpoint.layers[position], checkpoint.architecture
    modules: dict[str, Any] = dict(layer.named_modules())
    names = [name for name in architecture.attention if name in modules]
    read = modules[names[-1]].in_features if names else 0  # by the projection that writes to the stream
    apart = _three(names[:-1])
    if apart is not None:
        queries, keys, values = (int(modules[name].out_features) for name in apart)
        if queries == read:
            return QueriesKeysValues(apart, (queries, keys, values))
    elif architecture.fused is not None and len(names) == 2:
        keys = (int(modules[names[0]].out_features) - read) // 2
        head = read // int(checkpoint.config.num_attention_heads)
        groups = 1 if architecture.fused == "sections" else keys // head
        return QueriesKeysValues((names[0],), (read, keys, keys), groups)
    raise CheckpointError(
        f"--loss relations compares queries, keys and values of the last layer, which cannot be told apart in layer "
        f"{position} of {checkpoint.name} ({architecture.model_type}); take losses over logits or states."
    )


def _three(names: Sequence[str]) -> tuple[str, ...] | None:
    """Return those of the names that say which is which, in the order of queries, keys, values."""
    by_end = {name.rpartition(".")[2]: name for name in names}
    return next((tuple(by_end[end] for end in ends) for ends in _APART if set(ends) <= by_end.keys()), None)
