"""What an embedding model does behind its transformer: pooling, then modules on one vector a text.

The modules are those of sentence-transformers (https://sbert.net, versions 2 to 6), which compute the same. Shapes:
B texts, S tokens each, D hidden, E the dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layer_surgery.errors import CheckpointError

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
POOLING_MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
#: Names of single switches, which sentence-transformers wrote until version 5.
_SWITCHES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
#: Activations that a dense module may have; each is a class of `torch.nn` that is made without arguments.
ACTIVATIONS = ("ELU", "GELU", "Identity", "LeakyReLU", "ReLU", "SELU", "SiLU", "Sigmoid", "Softplus", "Tanh")
_VECTORS = "sentence_embedding"
#: What names of parameters in `SentenceModules` begin with; the number of a module behind pooling follows.
MODULE_PREFIX = "others."


@dataclass(frozen=True, kw_only=True)
class StoredModule:
    """One module as it is stored: its class, its folder, its configuration and its tensors (on the CPU)."""

    type: str  #: Full name of the class in sentence-transformers.
    path: str  #: Folder within the model's directory.
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Name of the class, whatever module of sentence-transformers it is in."""
        return self.type.rpartition(".")[2]


def pooling_modes(config: Mapping[str, Any], where: str) -> tuple[PoolingMode, ...]:
    """Return the ways of pooling that a configuration names; what several give is put side by side, in this order."""
    given = config.get("pooling_mode")
    if given is None:
        given = [mode for switch, mode in _SWITCHES.items() if config.get(switch)] or ["mean"]
    modes = tuple([given] if isinstance(given, str) else given)
    unknown = [mode for mode in modes if mode not in POOLING_MODES]
    if unknown:
        raise CheckpointError(f"{where} has pooling_mode {unknown[0]!r}; allowed: {', '.join(POOLING_MODES)}.")
    return modes


class Pooling(nn.Module):
    """Makes one vector of the hidden states of a text's tokens."""

    def __init__(self, modes: tuple[PoolingMode, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Map hidden states [B, S, D] and a mask [B, S] of tokens that are no padding to [B, modes x D]."""
        return torch.cat([_POOLS[mode](states, mask) for mode in self.modes], dim=-1)


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return _at(states, mask.int().argmax(dim=1))


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return _at(states, mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1))


def _at(states: Tensor, positions: Tensor) -> Tensor:
    return states[torch.arange(len(states), device=states.device), positions]


def _largest(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask[..., None] == 0, float("-inf")).amax(dim=1)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    return _summed(states, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1).to(states)


def _mean_sqrt(states: Tensor, mask: Tensor) -> Tensor:
    return _summed(states, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1).to(states).sqrt()


def _weighted_mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.cumsum(dim=1) * mask  # 1, 2, ... from the first token on
    return _summed(states, weights) / weights.sum(dim=1, keepdim=True).clamp(min=1).to(states)


def _summed(states: Tensor, weights: Tensor) -> Tensor:
    wide = torch.float32 if states.dtype in (torch.float16, torch.bfloat16) else states.dtype
    return (states * weights[..., None].to(states)).sum(dim=1, dtype=wide).to(states)


_POOLS: dict[PoolingMode, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


class Normalize(nn.Module):
    """Makes vectors of length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Map [B, E] to [B, E]."""
        return nn.functional.normalize(vectors, dim=-1)


class Dense(nn.Module):
    """A linear map with an activation, and perhaps its input added."""

    def __init__(self, tensors: Mapping[str, Tensor], activation: nn.Module, *, residual: bool) -> None:
        super().__init__()
        out, in_ = tensors["linear.weight"].shape
        self.linear = nn.Linear(in_, out, bias="linear.bias" in tensors, device="meta")
        self.residual = nn.Linear(in_, out, bias=False, device="meta") if "residual.weight" in tensors else None
        self.activation, self._adds_input = activation, residual
        self.load_state_dict(dict(tensors), assign=True)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map [B, in] to [B, out]."""
        mapped: Tensor = self.activation(self.linear(vectors))
        if not self._adds_input:
            return mapped
        return mapped + (vectors if self.residual is None else self.residual(vectors))


class SentenceModules(nn.Module):
    """Everything behind the transformer."""

    def __init__(self, pooling: Pooling, others: list[nn.Module]) -> None:
        super().__init__()
        self.pooling, self.others = pooling, nn.Sequential(*others)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Map hidden states [B, S, D] and a mask [B, S] of tokens that are no padding to embeddings [B, E]."""
        vectors: Tensor = self.others(self.pooling(states, mask))
        return vectors


def build(stored: tuple[StoredModule, ...], where: str) -> SentenceModules:
    """Make the modules behind the transformer, in the dtypes in which they are stored.

    Raises `CheckpointError` for a module that is not known, for tensors that do not fit, and for what a configuration
    asks of a module that is not done here.
    """
    if not stored or stored[0].kind != "Pooling" or any(each.kind == "Pooling" for each in stored[1:]):
        kinds = ", ".join(each.kind for each in stored) or "nothing"
        raise CheckpointError(f"{where} has {kinds} behind its transformer; allowed: Pooling first, and once.")
    pooling = Pooling(pooling_modes(stored[0].config, f"{where}/{stored[0].path}"))
    return SentenceModules(pooling, [_MAKERS[each.kind](each, f"{where}/{each.path}") for each in stored[1:]])


def _dense(stored: StoredModule, where: str) -> nn.Module:
    config, tensors = stored.config, stored.tensors
    _check_on_vectors(config, where)
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation.rpartition(".")[2]
    if not activation.startswith("torch.nn.") or name not in ACTIVATIONS:
        raise CheckpointError(
            f"{where} has the activation {activation}; allowed are these of torch.nn: {', '.join(ACTIVATIONS)}."
        )
    sizes = {key: config.get(key) for key in ("in_features", "out_features")}
    in_, out = sizes.values()
    residual = bool(config.get("use_residual", False))
    expected = {"linear.weight": [out, in_]}
    if config.get("bias", True):
        expected["linear.bias"] = [out]
    if residual and in_ != out:
        expected["residual.weight"] = [out, in_]
    _check_tensors(tensors, expected, where)
    return Dense(tensors, getattr(nn, name)(), residual=residual)


def _layer_norm(stored: StoredModule, where: str) -> nn.Module:
    size = stored.config.get("dimension")
    _check_tensors(stored.tensors, {"norm.weight": [size], "norm.bias": [size]}, where)
    norm = nn.LayerNorm(int(size or 0), device="meta")
    norm.load_state_dict({name.removeprefix("norm."): tensor for name, tensor in stored.tensors.items()}, assign=True)
    return norm


def _normalize(stored: StoredModule, where: str) -> nn.Module:
    _check_on_vectors(stored.config, where)
    return Normalize()


def _dropout(stored: StoredModule, where: str) -> nn.Module:
    return nn.Identity()  # it drops nothing where nothing is trained


_MAKERS: dict[str, Callable[[StoredModule, str], nn.Module]] = {
    "Dense": _dense,
    "Dropout": _dropout,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
}
#: Classes of sentence-transformers that may stand behind the transformer.
KNOWN = ("Pooling", *_MAKERS)


def _check_on_vectors(config: Mapping[str, Any], where: str) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, _VECTORS):
            raise CheckpointError(f"{where} has {key} {config[key]!r}; allowed: '{_VECTORS}' (one vector a text).")


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, list[Any]], where: str) -> None:
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != dict(expected):
        raise CheckpointError(
            f"{where} has the tensors {found}, but its config.json calls for {dict(expected)}; download it again."
        )
    bad = next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise CheckpointError(f"tensor '{bad}' in {where} holds NaN or Inf; the checkpoint is damaged.")
