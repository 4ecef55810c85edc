"""A checkpoint that is open: its configuration, where its tensors are, and what follows from both."""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layer_surgery.checkpoint.architectures import Architecture, base_model_type
from layer_surgery.checkpoint.embedder import Embedder
from layer_surgery.checkpoint.heads import CAUSAL_LM, EMBEDDING, Head, is_encoder, longest_input, objective_of
from layer_surgery.checkpoint.recognition import architecture_of
from layer_surgery.checkpoint.skeleton import make_skeleton
from layer_surgery.checkpoint.tensors import TensorSource
from layer_surgery.data.objective import Objective

#: Fields of a configuration that say where it came from, and not what the model computes.
NOT_IDENTITY = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "low_rank", "model_type", "narrowed"),
    "transformers_version",
}


@dataclass(kw_only=True)
class Checkpoint:
    """A language model with its head as configuration + named tensors + the files that travel with it."""

    name: str  #: As the user gave it: a directory, a hub name, or the class of a model in memory.
    config: Any
    config_fields: dict[str, Any]
    """The configuration as the checkpoint stores it; for a low-rank checkpoint that of its base architecture."""
    low_rank: dict[str, int]  #: Rank of every linear that is stored as factors; empty for a plain checkpoint.
    source: TensorSource  #: The tensors as the model has them (see conversion.py), whatever their form in files.
    head: Head = CAUSAL_LM
    narrowed: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Size (out, in) of every linear that is smaller than its architecture has it."""
    left_out: tuple[str, ...] = ()
    """Stored tensors that transformers' model class ignores, as heads that predict further tokens."""
    directory: Path | None = None
    files: tuple[Path, ...] = ()
    trust_remote_code: bool = False
    model_class: type[PreTrainedModel] | None = None
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    """Non-persistent buffers of a model in memory, which may differ from freshly made ones."""
    generation_config: Any = None  #: Of a model in memory; one in a directory is copied as a file.
    embedder: Embedder | None = None  #: What makes one vector a text of the hidden states; embedding models only.

    @functools.cached_property
    def architecture(self) -> Architecture:
        """Names of its modules; raises `CheckpointError` for an architecture that cannot be operated on."""
        return architecture_of(self.skeleton)

    @property
    def layer_count(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def vocabulary_size(self) -> int:
        """Number of rows of the embedding."""
        return int(self.skeleton.get_input_embeddings().weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states; embeddings of tokens may be narrower, as those of ELECTRA."""
        return int(self.config.hidden_size)

    @property
    def longest_sequence(self) -> int | None:
        """Most tokens that the model takes; None where its configuration does not say."""
        limits = (longest_input(self.config, self.skeleton), self.embedder.longest if self.embedder else None)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def encoder(self) -> bool:
        """Whether every token sees all others, so that the model has to be told which are padding."""
        return is_encoder(self.config, self.head)

    @property
    def objective(self) -> Objective:
        """The problem that its head solves."""
        found = objective_of(self.config, self.head, self.longest_sequence)
        return found if self.embedder is None else replace(found, prompt=self.embedder.prompt)

    @functools.cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model with its parameters on the meta device: shapes and names, no memory."""
        return build_skeleton(self)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of most of the stored parameters."""
        sizes: dict[torch.dtype, int] = {}
        for spec in self.source.specs.values():
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.numel
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        others = self.embedder.tensors.values() if self.embedder else ()
        return sum(each.numel() for each in (*self.skeleton.parameters(), *others))

    @property
    def size_bytes(self) -> int:
        """Bytes of all stored tensors."""
        others = self.embedder.tensors.values() if self.embedder else ()
        return sum(each.nbytes for each in (*self.source.specs.values(), *others))

    def layer_prefix(self, index: int) -> str:
        return f"{self.architecture.layers}.{index}."

    def layer_tensors(self, index: int) -> list[str]:
        """Names of all stored tensors of a decoder layer."""
        prefix = self.layer_prefix(index)
        return [name for name in self.source.specs if name.startswith(prefix)]

    def other_tensors(self) -> list[str]:
        """Names of all stored tensors that belong to no decoder layer."""
        prefix = self.architecture.layers + "."
        return [name for name in self.source.specs if not name.startswith(prefix)]

    def layer_parameters(self, index: int) -> int:
        """Number of parameters of a decoder layer, norms and biases included."""
        return sum(p.numel() for p in self.layers[index].parameters())

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.skeleton.get_submodule(self.architecture.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def sha256(self, progress: Callable[[], None] = lambda: None) -> str:
        """Hash of architecture and weights: the same from files, however they are sharded, and from memory.

        `progress` is called after each tensor.
        """
        fields = self.config.to_dict()
        fields = fields.get("base_config", fields)  # of a checkpoint with low-rank layers
        identity = {
            "model_type": base_model_type(self.config),
            "low_rank": self.low_rank,
            **({"narrowed": self.narrowed} if self.narrowed else {}),
            **({"embedder": self.embedder.identity} if self.embedder else {}),
            "config": {name: value for name, value in fields.items() if name not in NOT_IDENTITY},
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        for name in sorted(self.source.specs):
            tensor = self.source.read([name], torch.device("cpu"))[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            array: Any = tensor.flatten().view(torch.uint8).numpy()
            digest.update(array.data)
            progress()
        return digest.hexdigest()


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make the model of a checkpoint without its weights; `dtype` is that of computation (see skeleton.py).

    An embedding model has a pooler, which nothing here looks at, only if its checkpoint has one.
    """
    skeleton = _skeleton(checkpoint, dtype)
    has_one = any(".pooler." in f".{name}" for name in checkpoint.source.specs)
    if checkpoint.head is EMBEDDING and not has_one and hasattr(skeleton, "pooler"):
        skeleton.pooler = None
    return skeleton


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    return make_skeleton(
        checkpoint.config,
        checkpoint.model_class,
        checkpoint.head,
        dtype=dtype,
        trust_remote_code=checkpoint.trust_remote_code,
        buffers=checkpoint.buffers,
    )
