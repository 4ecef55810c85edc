"""Learn, by running the model itself with stubs for layers, what a layer is called with and what follows the last.

So embeddings, position embeddings, masks, the final norm, the head and whatever scaling an architecture does around
them are the model's own code, and no other code here knows about them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from layer_surgery.errors import CheckpointError
from layer_surgery.walk.streamed import StreamedModel

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
"""What a model is called with: token ids [batch, sequence] int64 alone, or all arguments, as `PackedTokens.inputs` has
them."""

#: What a layer may return, of its hidden states: models unpack it in different ways.
_RETURNED: tuple[Callable[[Tensor], Any], ...] = (
    lambda states: states,
    lambda states: (states,),
    lambda states: (states, None),
)


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run `layer` on [batch, sequence, hidden] and return the hidden states only."""
        output: Any = layer(hidden, *self.args, **self.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


class _Stub(nn.Module):
    """Stands for a layer: hands its call to `on_call`, and passes unknown attributes on to the layer."""

    def __init__(self, layer: nn.Module, on_call: Callable[[Tensor, LayerCall], Any]) -> None:
        super().__init__()
        # Not registered as a submodule: the stub has no parameters of its own.
        object.__setattr__(self, "_layer", layer)
        self._on_call = on_call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._on_call(hidden_states, LayerCall(args, kwargs))


@contextmanager
def stubs(model: StreamedModel, on_call: Callable[[int, Tensor, LayerCall], Any]) -> Iterator[None]:
    """Replace every layer by a stub for the duration of the block."""
    layers = model.layers
    originals = list(layers)
    try:
        for index, layer in enumerate(originals):
            layers[index] = _Stub(layer, partial(on_call, index))
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


class Rehearsal:
    """The model's own code before, between and after its layers."""

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._calls: dict[tuple[int, int], list[LayerCall]] = {}
        self._returned: Callable[[Tensor], Any] | None = None
        # Encoders keep no cache, and some do not know the word.
        self._options = {} if model.checkpoint.encoder else {"use_cache": False}
        self.depends_on_content = False
        """Whether layers are called with something that depends on the tokens beside the hidden states (found out by
        comparing batches as they are embedded)."""
        self._latest: tuple[Mapping[str, Tensor], list[LayerCall]] | None = None

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> Tensor:
        """Return the first boundary, [batch, sequence, hidden]."""
        given = _named(inputs)
        first, calls = self._rehearse(given)
        known = self._calls.setdefault(_shape(given), calls)
        if not self.depends_on_content and known is not calls:
            self.depends_on_content = not all(map(same_call, known, calls))
        return first

    @torch.no_grad()
    def call(self, index: int, inputs: Inputs) -> LayerCall:
        """Return what layer `index` is called with for these inputs.

        Rehearsed once for each shape, or for each batch where calls depend on content (the latest batch is kept), as
        they do where the model is told which tokens are padding, or where each one stands.
        """
        given = _named(inputs)
        if self.depends_on_content or len(given) > 1:
            if self._latest is None or not _same(self._latest[0], given):
                self._latest = (given, self._rehearse(given)[1])
            return self._latest[1][index]
        shape = _shape(given)
        if shape not in self._calls:
            self._calls[shape] = self._rehearse(given)[1]
        return self._calls[shape][index]

    def head(self, hidden: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Return the logits that follow the last boundary [batch, sequence, hidden]. Differentiable.

        For one answer a sequence they are [batch, labels] (of an embedding model the embeddings), and `inputs` are
        what the model is called with: where the answer is read off depends on it. Otherwise they are [batch, sequence,
        vocabulary or labels]: everything after the last layer then works on each token by itself, so any [batch,
        sequence] cut will do as long as the sequence is not longer than the model allows, and inputs do not matter.
        """
        last = self._model.layer_count - 1
        given = self._dummy(hidden) if inputs is None else _named(inputs)
        if self._returned is None:
            self._rehearse(given)

        with self._stubs(lambda index, passing, _call: hidden if index == last else passing):
            return self._model.answer(self._model.model(**self.arguments(given)), given)

    def _dummy(self, hidden: Tensor) -> dict[str, Tensor]:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        # An encoder might otherwise take these for padding, and warn.
        mask = {"attention_mask": torch.ones_like(ids)} if self._model.checkpoint.encoder else {}
        return {"input_ids": ids, **mask}

    def arguments(self, given: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return these inputs, on the device, with what else the model is called with here."""
        return {name: tensor.to(self._model.device) for name, tensor in given.items()} | self._options

    def _rehearse(self, given: Mapping[str, Tensor]) -> tuple[Tensor, list[LayerCall]]:
        """Return the first boundary and what each layer is called with."""
        if self._returned is not None:
            return self._record(given)
        failures = []  # the first time: only one of them works, as the model unpacks what a layer returns or not
        for returned in _RETURNED:
            self._returned = returned
            try:
                return self._record(given)
            except Exception as error:  # whatever a model raises that gets another kind
                failures.append(error)
        self._returned = None
        raise failures[0]

    def _record(self, given: Mapping[str, Tensor]) -> tuple[Tensor, list[LayerCall]]:
        seen: list[Tensor] = []
        calls: list[LayerCall] = []

        def record(_index: int, hidden: Tensor, call: LayerCall) -> Tensor:
            seen.append(hidden)
            calls.append(call)
            return hidden

        with self._stubs(record):
            # The decoder without its head: the head would make a needless [tokens, vocabulary] matrix.
            output = self._model.model.base_model(**self.arguments(given))
        if len(calls) != self._model.layer_count:
            raise CheckpointError(
                f"the layers of {self._model.checkpoint.name} are not called once each ({len(calls)} calls of "
                f"{self._model.layer_count} layers), so they cannot be operated on."
            )
        if {hidden.shape for hidden in seen} != {seen[0].shape} or output[0].shape[:2] != _shape(given):
            raise CheckpointError(
                f"the layers of {self._model.checkpoint.name} do not hand on hidden states of one shape, so they "
                "cannot be operated on."
            )
        return seen[0], calls

    @contextmanager
    def _stubs(self, on_call: Callable[[int, Tensor, LayerCall], Tensor]) -> Iterator[None]:
        def returning(index: int, hidden: Tensor, call: LayerCall) -> Any:
            assert self._returned is not None
            return self._returned(on_call(index, hidden, call))

        with stubs(self._model, returning):
            yield


def blocks(shape: Sequence[int], most: int) -> Iterator[tuple[slice, slice]]:
    """Cut [batch, sequence] into blocks of at most `most` tokens (at least 1), for `Rehearsal.head`."""
    (batch, length), most = shape, max(1, most)
    row_step, column_step = max(1, most // length), min(length, most)
    for row in range(0, batch, row_step):
        for column in range(0, length, column_step):
            yield slice(row, min(row + row_step, batch)), slice(column, min(column + column_step, length))


def _named(inputs: Inputs) -> Mapping[str, Tensor]:
    return {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs


def _shape(given: Mapping[str, Tensor]) -> tuple[int, int]:
    batch, length = given["input_ids"].shape
    return batch, length


def same_call(a: LayerCall, b: LayerCall) -> bool:
    """Return whether two calls are with equal arguments, tensors compared by value."""
    return _same(a.args, b.args) and _same(a.kwargs, b.kwargs)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and (a == b or not isinstance(a, str | int | float | bool))
