"""Learn, by running the model itself with stubs for layers, what a layer is called with and what follows the last.

So embeddings, position embeddings, masks, the final norm, the head and whatever scaling an architecture does around
them are the model's own code, and no other code here knows about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery.streaming import StreamedModel


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run `layer` on [batch, sequence, hidden] and return the hidden states only."""
        output: Any = layer(hidden, *self.args, **self.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


class _Stub(nn.Module):
    """Stands for a layer: hands its call to `on_call`, and passes unknown attributes on to the layer."""

    def __init__(self, layer: nn.Module, on_call: Callable[[Tensor, LayerCall], Tensor]) -> None:
        super().__init__()
        # Not registered as a submodule: the stub has no parameters of its own.
        object.__setattr__(self, "_layer", layer)
        self._on_call = on_call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._on_call(hidden_states, LayerCall(args, kwargs))


@contextmanager
def _stubs(model: StreamedModel, on_call: Callable[[int, Tensor, LayerCall], Tensor]) -> Iterator[None]:
    """Replace every layer by a stub for the duration of the block."""
    layers = model.layers
    originals = list(layers)

    def bound(index: int) -> Callable[[Tensor, LayerCall], Tensor]:
        return lambda hidden, call: on_call(index, hidden, call)

    try:
        for index, layer in enumerate(originals):
            layers[index] = _Stub(layer, bound(index))
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


class Rehearsal:
    """The model's own code before, between and after its layers."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._calls: dict[tuple[int, int], list[LayerCall]] = {}

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the first boundary, [batch, sequence, hidden], for token ids [batch, sequence] int64."""
        first: list[Tensor] = []
        calls: list[LayerCall] = []

        def record(index: int, hidden: Tensor, call: LayerCall) -> Tensor:
            if index == 0:
                first.append(hidden)
            calls.append(call)
            return hidden

        with _stubs(self._model, record):
            # The decoder without its head: the head would make a needless [tokens, vocabulary] matrix.
            self._model.model.base_model(input_ids=token_ids.to(self._model.device), use_cache=False)
        self._calls.setdefault((token_ids.shape[0], token_ids.shape[1]), calls)
        return first[0]

    def call(self, index: int, batch: int, sequence: int) -> LayerCall:
        """Return what layer `index` is called with for any batch of this shape (rehearsed once for each shape)."""
        if (batch, sequence) not in self._calls:
            self.embed(torch.zeros(batch, sequence, dtype=torch.int64))
        return self._calls[batch, sequence][index]

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits [batch, sequence, vocabulary] that follow the last boundary [batch, sequence, hidden].

        Everything after the last layer works on each token by itself, so any [batch, sequence] cut will do as long
        as the sequence is not longer than the model allows. Differentiable.
        """
        last = self._model.layer_count - 1

        def inject(index: int, passing: Tensor, _call: LayerCall) -> Tensor:
            return hidden if index == last else passing

        dummy = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with _stubs(self._model, inject):
            logits: Tensor = self._model.model(input_ids=dummy, use_cache=False).logits
        return logits
