"""A whole model in memory without what stands behind its last layer, run on windows and watched on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery.walk.rehearsal import Rehearsal
from layer_surgery.walk.streamed import StreamedModel


class Body:
    """Embeddings and layers of a model that is whole in memory. Shapes: B windows of S tokens, D hidden."""

    def __init__(self, streamed: StreamedModel) -> None:
        """Load the model whole; `streamed` keeps no layers of its own (`resident_bytes=0`)."""
        self.model: Any = streamed.load_whole()  # a PreTrainedModel
        self.checkpoint, self.device, self.dtype = streamed.checkpoint, streamed.device, streamed.dtype
        self.rehearsal = Rehearsal(streamed)
        self._streamed = streamed

    @property
    def layers(self) -> nn.ModuleList:
        return self._streamed.layers

    @property
    def last(self) -> int:
        """Number of the last layer."""
        return len(self.layers) - 1

    def states(self, given: Mapping[str, Tensor], positions: Iterable[int] = ()) -> dict[int, Tensor]:
        """Return the states [B, S, D] after the last layer and those at `positions`, by layer."""
        with _outputs_of(self.layers, {self.last, *positions}) as seen:
            self.model.base_model(**self.rehearsal.arguments(given))
        return seen

    def rest(self, hidden: Tensor, first: int, given: Mapping[str, Tensor]) -> Tensor:
        """Return the states [B, S, D] after the last layer of states that go into layer `first`. Differentiable."""
        states = hidden.to(self.dtype)
        for index in range(first, len(self.layers)):
            states = self.rehearsal.call(index, given)(self.layers[index], states)
        return states

    @torch.no_grad()
    def where_not_finite(self, given: Mapping[str, Tensor]) -> str:
        """Return words that name the first layer whose states are not finite."""
        seen = self.states(given, range(len(self.layers)))
        bad = [position for position in sorted(seen) if not torch.isfinite(seen[position]).all()]
        return f"the first states that are not finite come out of layer {bad[0]}" if bad else "all states are finite"


@contextmanager
def _outputs_of(layers: nn.ModuleList, positions: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, the states that come out of some layers are put into what is yielded, by position."""
    seen: dict[int, Tensor] = {}

    def take(position: int, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        seen[position] = output[0] if isinstance(output, tuple) else output

    hooks = [layers[position].register_forward_hook(partial(take, position)) for position in positions]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
