"""A model of which only one decoder layer at a time has weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from layer_surgery.checkpoint.checkpoint import Checkpoint, build_skeleton
from layer_surgery.checkpoint.modeling_layer_surgery import replace_linears
from layer_surgery.devices import frees_to_system
from layer_surgery.errors import NumericalError
from layer_surgery.machine import map_large_blocks, release_freed_memory
from layer_surgery.walk.ahead import ReadAhead


class StreamedModel:
    """The skeleton of a checkpoint with its embeddings, final norm and head in memory; layers come and go.

    If all layers together take at most `resident_bytes`, they stay after their first use. If not, and one layer more
    takes at most `ahead_bytes`, the next is read while one is worked on.
    The user's own model, where one was given, is never touched: parameters are shared with it, modules are not.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        resident_bytes: int = 1 << 29,
        ahead_bytes: int = 0,
    ) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.model = build_skeleton(checkpoint, dtype)
        self.architecture = checkpoint.architecture
        self._layers = list(self.layers)  # the layers themselves, also while others stand in their places
        self._checked: set[str] = set()
        layer_bytes = [layer_bytes_of(checkpoint, layer, dtype) for layer in self.layers]
        self._resident: dict[int, dict[str, Tensor]] | None = {} if sum(layer_bytes) <= resident_bytes else None
        fits = (
            self._resident is None and 2 * max(layer_bytes) <= ahead_bytes
        )  # as stored and in the dtype of computation
        self._ahead = ReadAhead(self._layer_tensors, device) if fits else None
        if self._resident is None and frees_to_system(device):
            map_large_blocks()
        self._sentence = checkpoint.embedder.modules().to(device, dtype) if checkpoint.embedder is not None else None
        self._replaced: dict[int, Callable[[], dict[str, Tensor]]] = {}
        self._originals: dict[tuple[int, str], nn.Module] = {}
        self._load_outside()

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.model.get_submodule(self.architecture.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    @property
    def behind(self) -> nn.Module | None:
        """The modules behind the transformer of an embedding model."""
        return self._sentence

    @property
    def hidden_size(self) -> int:
        # Not the width of the embeddings: OPT may project them.
        return int(self.model.config.hidden_size)

    @property
    def vocabulary_size(self) -> int:
        return self.checkpoint.vocabulary_size

    def read_ahead(self, index: int | None) -> None:
        """Say which layer is asked for next (None: that is not known), so that it may be read meanwhile."""
        if self._ahead is not None and index is not None:
            self._ahead.begin(index)

    @contextmanager
    def layer(self, index: int, ahead: int | None = None) -> Iterator[nn.Module]:
        """Give decoder layer `index` its weights for the duration of the block, in the dtype of computation.

        `ahead` is the layer that is asked for next, if that is known.
        """
        layer = self._layers[index]
        tensors = None if self._ahead is None else self._ahead.take(index)
        if tensors is None:
            tensors = self._layer_tensors(index)
        self.read_ahead(ahead)
        try:
            _assign(layer, tensors)
            yield layer
        finally:
            layer.requires_grad_(False)
            _assign(layer, {name: tensor.to("meta") for name, tensor in tensors.items()})
            del tensors
            if self._resident is None and frees_to_system(self.device):
                release_freed_memory()

    def read_weights(self, names: list[str]) -> dict[str, Tensor]:
        """Return stored tensors on the device in the dtype of computation; raises `NumericalError` on NaN or Inf."""
        tensors = {}
        for name, tensor in self.checkpoint.source.read(names, self.device).items():
            if tensor.is_floating_point() and name not in self._checked:
                if not torch.isfinite(tensor).all():
                    raise NumericalError(
                        f"tensor '{name}' of {self.checkpoint.name} holds NaN or Inf; the checkpoint is damaged."
                    )
                self._checked.add(name)
            tensors[name] = tensor.to(self._dtype_of(name)) if tensor.is_floating_point() else tensor
        return tensors

    def _dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of computation, or that of a tensor which its architecture keeps in float32."""
        plan = self.model._get_dtype_plan(self.dtype)
        if not plan:
            return self.dtype
        pattern, key_of_group, _ = build_glob_alternation(list(plan))
        match = pattern.search(name)
        return plan[key_of_group[match.lastgroup]] if match else self.dtype

    def replace(self, index: int, ranks: dict[str, int], read_factors: Callable[[], dict[str, Tensor]]) -> None:
        """Put low-rank linears in a layer; `read_factors` gives their tensors by name within the layer.

        This changes the model in this object only, not the checkpoint.
        """
        for name in ranks:
            self._originals.setdefault((index, name), self._layers[index].get_submodule(name))
        self._forget_ahead()
        replace_linears(self._layers[index], ranks)
        self._replaced[index] = read_factors
        if self._resident is not None:
            self._resident.pop(index, None)

    def restore(self) -> None:
        """Undo every `replace`."""
        self._forget_ahead()
        for (index, name), module in self._originals.items():
            self._layers[index].set_submodule(name, module)
            if self._resident is not None:
                self._resident.pop(index, None)
        self._originals.clear()
        self._replaced.clear()

    def answer(self, output: Any, given: Mapping[str, Tensor]) -> Tensor:
        """Return what the model is asked for, of what its forward pass gives for these inputs.

        Logits; of an embedding model its embeddings [batch, dimensions], before any other is compared with them.
        """
        if self._sentence is None:
            logits: Tensor = output.logits
            return logits
        states: Tensor = output.last_hidden_state
        embeddings: Tensor = self._sentence(states, given["attention_mask"].to(states.device))
        return embeddings

    def load_whole(self) -> PreTrainedModel:
        """Give every layer its weights for good and return the model, ready to run by itself: all in memory."""
        for index, layer in enumerate(self._layers):
            _assign(layer, self._layer_tensors(index))
        return self.model

    def _layer_tensors(self, index: int) -> dict[str, Tensor]:
        if self._resident is not None and index in self._resident:
            return self._resident[index]
        prefix = self.checkpoint.layer_prefix(index)
        known = self._layers[index].state_dict().keys()
        names = [prefix + name for name in known if prefix + name in self.checkpoint.source.specs]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self.read_weights(names).items()}
        if index in self._replaced:
            factors = self._replaced[index]()
            tensors |= {name: tensor.to(self.device, self.dtype) for name, tensor in factors.items()}
        if self._resident is not None:
            self._resident[index] = tensors
        return tensors

    def _forget_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.drop()

    def _load_outside(self) -> None:
        """Load everything that belongs to no layer, and tie what was tied."""
        state = self.model.state_dict()
        tied = getattr(self.model, "all_tied_weights_keys", {}) or {}
        names = [name for name in self.checkpoint.other_tensors() if name in state and name not in tied]
        _assign(self.model, self.read_weights(names))
        for target, origin in tied.items():
            owner, _, attribute = target.rpartition(".")
            setattr(self.model.get_submodule(owner), attribute, self.model.get_parameter(origin))
        for name, buffer in list(self.model.named_buffers()):
            if not buffer.is_meta:  # else a stored buffer of a layer, which comes and goes with it
                _assign(self.model, {name: buffer.to(self.device)})


def layer_bytes_of(checkpoint: Checkpoint, layer: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of a layer in the dtype of computation, or as stored if that is more."""
    itemsize = max(dtype.itemsize, checkpoint.dtype.itemsize)
    return sum(parameter.numel() for parameter in layer.parameters()) * itemsize


def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the place of a module's parameters and buffers, without copying."""
    for name, tensor in tensors.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if attribute in owner._parameters:
            owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[attribute] = tensor
