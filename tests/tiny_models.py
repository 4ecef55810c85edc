"""Tiny random models, checkpoints and tokens for tests: built in the process, no files from outside, no network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_families import FIELDS, SIZES, VOCABULARY
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.recognition import architecture_of
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.walk.gradients import accumulated_gradients
from layer_surgery.walk.observer import Observer
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk, WalkSettings

CPU = torch.device("cpu")


def tiny_model(
    model_type: str = "llama",
    *,
    layers: int = 4,
    dtype: torch.dtype = torch.float64,
    tied: bool = False,
    seed: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """Return a model with random weights, biases and norms, from its configuration class, in eval mode."""
    config = AutoConfig.for_model(
        model_type,
        **SIZES | FIELDS.get(model_type, {}) | {"num_hidden_layers": layers, "tie_word_embeddings": tied} | fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms start as ones and biases as zeros, which would hide mistakes
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tiny_checkpoint(directory: Path, model: PreTrainedModel | None = None, *, max_shard_size: str = "1GB") -> Path:
    """Save `model` (default: a tiny llama) into a new directory and return it; small shards make several files."""
    target = directory / "model"
    (model or tiny_model()).save_pretrained(target, max_shard_size=max_shard_size)
    return target


def packed_tokens(
    n: int = 5,
    s: int = 12,
    *,
    seed: int = 0,
    padding: bool = False,
    excluded: float = 0.0,
    vocabulary: int = VOCABULARY,
) -> PackedTokens:
    """Return `n` random sequences of `s` tokens.

    Args:
        padding: every sequence but the first is padded on the right, each to another length.
        excluded: about this fraction of the tokens carries no loss.
    """
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(3, vocabulary, (n, s), generator=generator)
    valid = torch.ones(n, s, dtype=torch.bool)
    if padding:
        for row in range(1, n):
            valid[row, s - 1 - (row - 1) % (s // 2) :] = False
    loss_mask = valid & (torch.rand(n, s, generator=generator) >= excluded)
    loss_mask[:, 0] = False
    return PackedTokens(
        name="random tokens",
        token_ids=torch.where(valid, token_ids, 0),
        loss_mask=loss_mask,
        valid=valid,
        tokens_available=int(valid.sum()),
        sha256="0" * 64,
    )


def padded_on_the_right(tokens: PackedTokens, more: int) -> PackedTokens:
    """Return the sequences with `more` tokens of padding behind each."""
    pad = torch.zeros(tokens.sequences, more, dtype=torch.int64)
    parts = {"token_ids": pad, "loss_mask": pad > 0, "valid": pad > 0}
    return replace(tokens, **{name: torch.cat([getattr(tokens, name), part], dim=1) for name, part in parts.items()})


CALIBRATION = packed_tokens(5, 12, padding=True, excluded=0.3)


def streamed(
    model: PreTrainedModel | Path | Checkpoint, *, dtype: torch.dtype = torch.float64, resident_bytes: int = 1 << 29
) -> StreamedModel:
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    return StreamedModel(checkpoint, device=CPU, dtype=dtype, resident_bytes=resident_bytes)


def settings(scratch: Path, *, batch_size: int = 2, boundary_memory_bytes: int = 1 << 29) -> WalkSettings:
    return WalkSettings(batch_size=batch_size, boundary_memory_bytes=boundary_memory_bytes, scratch=scratch)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_submodule(architecture_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


@torch.no_grad()
def whole_logits(model: PreTrainedModel, tokens: PackedTokens) -> Tensor:
    """Return the logits [N, S, V] of the whole model at once, without a cache."""
    logits: Tensor = model(tokens.token_ids, use_cache=False).logits
    return logits


def whole_losses(logits: Tensor, tokens: PackedTokens) -> Tensor:
    """Return the summed cross-entropy [N] of the tokens that count, written without torch's own cross-entropy."""
    log_probabilities = logits[:, :-1].log_softmax(-1)
    chosen = log_probabilities.gather(-1, tokens.token_ids[:, 1:, None]).squeeze(-1)
    return -(chosen * tokens.loss_mask[:, 1:]).sum(dim=1)


def whole_gradients(model: PreTrainedModel, tokens: PackedTokens) -> dict[str, Tensor]:
    """Return the gradient of the summed loss for every parameter, by autograd through the whole model."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = whole_losses(model(tokens.token_ids, use_cache=False).logits, tokens).sum()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@torch.no_grad()
def whole_boundaries(model: PreTrainedModel, tokens: PackedTokens) -> list[Tensor]:
    """Return the hidden states [N, S, D] before the first layer and after each, from hooks on the whole model."""
    seen: list[Tensor] = []

    def before(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append(arguments[0] if arguments else keywords["hidden_states"])

    def after(_module: nn.Module, _arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    layers = decoder_layers(model)
    hooks = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    model(tokens.token_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def without_layers(model: PreTrainedModel, removed: Iterable[int]) -> PreTrainedModel:
    """Return a copy of the model with layers deleted by hand; what is per layer in its configuration goes with them."""
    copied = copy.deepcopy(model)
    layers = decoder_layers(copied)
    kept = [index for index in range(len(layers)) if index not in set(removed)]
    copied.config.num_hidden_layers = len(kept)
    for name in ("layer_types", "no_rope_layers"):
        if len(getattr(copied.config, name, None) or []) == len(layers):
            setattr(copied.config, name, [getattr(copied.config, name)[index] for index in kept])
    parent, _, name = architecture_of(model).layers.rpartition(".")
    setattr(copied.get_submodule(parent), name, nn.ModuleList([layers[index] for index in kept]))
    return copied


class GradientObserver(Observer):
    """Collects the gradient of every parameter of every layer that it sees (tests can afford to keep them)."""

    def __init__(self, layers: str = "model.layers") -> None:
        self.layers = layers
        self.gradients: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        with accumulated_gradients(dict(layer.named_parameters())) as gradients:
            yield
            self.gradients |= {f"{self.layers}.{index}.{name}": tensor for name, tensor in gradients.items()}


def walked_gradients(walk: Walk) -> dict[str, Tensor]:
    """Return the gradient of the summed loss for every parameter of every layer, from one forward and backward walk."""
    observer = GradientObserver(walk.model.architecture.layers)
    walk.backpropagate([observer])
    return observer.gradients


def walked_logits(model: StreamedModel, tokens: PackedTokens, where: WalkSettings) -> Tensor:
    """Return the logits [N, S, V] of a streamed walk."""
    with Walk(model, tokens, where) as walk, torch.no_grad():
        last = walk.forward(range(model.layer_count), keep=False)
        return torch.cat([walk.rehearsal.head(last.read(rows)) for rows in walk.batches()])


def make_test_plan(
    layers: int, *, removed: Iterable[int] = (), low_rank: dict[int, dict[str, int]] | None = None, method: str = "svd"
) -> SurgeryPlan:
    """Return a plan for `layers` layers, of which some go and some become low-rank."""
    removed, low_rank = set(removed), low_rank or {}
    entries = [
        LayerPlan(
            index=index,
            action="remove" if index in removed else "low_rank" if index in low_rank else "keep",
            ranks=low_rank.get(index, {}),
        )
        for index in range(layers)
    ]
    return SurgeryPlan(method=method, target_layers=sum(entry.action == "keep" for entry in entries), layers=entries)


def full_ranks(checkpoint: Checkpoint, index: int) -> dict[str, int]:
    """Return min(out, in) for every linear of a layer."""
    prefix = checkpoint.layer_prefix(index)
    shapes = {name: checkpoint.source.specs.get(f"{prefix}{name}.weight") for name in checkpoint.architecture.linears}
    return {name: min(spec.shape) for name, spec in shapes.items() if spec is not None}


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest entry where that is above 1."""
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1.0))


def largest_gradient_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference over all tensors, relative to the largest entry of each."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max()) for name in a)


def hooks_on(module: nn.Module) -> list[str]:
    """Name every hook on a module, its submodules and their parameters."""
    found = []
    for name, part in module.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            if getattr(part, kind):
                found.append(f"{name}.{kind}")
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            found.append(name)
    return found


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Return everything about a user's model that must not change, for an equality check by `same`."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "addresses": {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
        "buffers": {name: tensor.clone() for name, tensor in model.named_buffers()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: p.grad is None for name, p in model.named_parameters()},
        "hooks": hooks_on(model),
        "modules": {name: id(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what differs between two snapshots; tensors must be equal bit for bit."""
    equal: Callable[[Any, Any], bool] = lambda a, b: torch.equal(a, b) if isinstance(a, Tensor) else a == b  # noqa: E731
    found = []
    for kind, was in before.items():
        now = after[kind]
        if isinstance(was, dict):
            same = was.keys() == now.keys() and all(equal(was[key], now[key]) for key in was)
        else:
            same = was == now
        if not same:
            found.append(kind)
    return found
