"""The proofs that every model gives before it is worked on: walked layer by layer it computes what it computes whole,
and its layers stay what they are when others go.

Architectures differ in more ways than a table can say. What is not as assumed is refused here, by name.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.heads import CAUSAL_LM
from layer_surgery.errors import CheckpointError, LayerSurgeryError, PlanError
from layer_surgery.walk.finite import not_finite
from layer_surgery.walk.rehearsal import LayerCall, Rehearsal, same_call, stubs
from layer_surgery.walk.streamed import StreamedModel

#: Length of the sequences that are tried.
LENGTH = 16
#: Largest difference, as a fraction of the largest value. The kernels are the same and so, normally, are the numbers.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_Inputs: TypeAlias = dict[str, Tensor]  # what a model is called with
_NUMBER_OF_LAYER = ("layer_idx", "layer_id", "layer_index", "block_idx")


@torch.no_grad()
def check_walk(model: StreamedModel) -> None:
    """Raise `CheckpointError` unless the walk gives the logits of the model's own forward pass, and is causal.

    The model's own forward runs once, with each layer loaded while it runs, and the walk takes its steps beside it: so
    every layer is read once and memory stays that of one layer. Two sequences that begin alike go through the walk,
    one after the other in each layer, and the second is compared: what one leaves behind must not reach the other.
    """
    name = model.checkpoint.name
    inputs = _sequences(model)
    try:
        logits, own_logits, different = _walked_beside_own(model, inputs)
    except LayerSurgeryError:
        raise
    except Exception as error:  # whatever a model raises that is not built as the walk takes it to be
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the layers of {name} cannot be run one after another ({type(error).__name__}: {reason}); "
            f"its architecture{_guessed(model)} is not supported."
        ) from error
    if different or not _close(logits[1], own_logits):
        where = f"from layer {different[0]} on" if different else "after the last layer"
        raise CheckpointError(
            f"running the layers of {name} one after another does not give what the model itself gives ({where}), so "
            f"nothing that is measured that way would be true; its architecture{_guessed(model)} is not supported."
        )
    if model.checkpoint.head is not CAUSAL_LM:
        return
    half = inputs[0]["input_ids"].shape[1] // 2
    first, second = (part[:, :half].double() for part in logits)
    if (first - second).abs().mean() > 10 * TOLERANCE[model.dtype] * second.abs().mean():
        raise CheckpointError(
            f"{name} is not a causal language model: its predictions depend on later tokens; only decoder-only "
            "language models are operated on."
        )


def _walked_beside_own(model: StreamedModel, inputs: tuple[_Inputs, _Inputs]) -> tuple[list[Tensor], Tensor, list[int]]:
    """Return the logits of both sequences from the walk, those of the second from the model's own forward pass, and
    the layers after which the two differ."""
    rehearsal = Rehearsal(model)
    states = [rehearsal.embed(given) for given in inputs]
    if not all(torch.isfinite(each).all() for each in states):
        raise not_finite(model, "the embeddings")
    calls = [[rehearsal.call(index, given) for index in range(model.layer_count)] for given in inputs]
    different: list[int] = []

    def run(index: int, hidden: Tensor, call: LayerCall) -> Any:
        with model.layer(index) as layer:
            for row in range(2):
                states[row] = calls[row][index](layer, states[row])
                if not torch.isfinite(states[row]).all():
                    raise not_finite(model, f"the hidden states after layer {index}")
            output = layer(hidden, *call.args, **call.kwargs)
        own = output[0] if isinstance(output, tuple) else output
        if not _close(states[1], own):
            different.append(index)
        return output

    with stubs(model, run):
        own_logits = model.answer(model.model(**rehearsal.arguments(inputs[1])), inputs[1])
    of_sequences = model.checkpoint.objective.of_sequences
    logits = [
        rehearsal.head(hidden, given if of_sequences else None) for hidden, given in zip(states, inputs, strict=True)
    ]
    if not all(torch.isfinite(each).all() for each in logits):
        raise not_finite(model, "the logits")
    return logits, own_logits, different


def _sequences(model: StreamedModel) -> tuple[_Inputs, _Inputs]:
    """Return two sequences of token ids [1, S] that begin alike; the second, for models that are told so, padded."""
    checkpoint = model.checkpoint
    length = min(LENGTH, checkpoint.longest_sequence or LENGTH)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocabulary_size, (2, length), generator=generator)
    ids[0, : length // 2] = ids[1, : length // 2]
    if checkpoint.head is CAUSAL_LM:
        return {"input_ids": ids[:1]}, {"input_ids": ids[1:]}
    mask = torch.ones_like(ids)
    mask[1, length - length // 4 :] = 0
    ids[1, length - length // 4 :] = checkpoint.objective.padding_id or 0
    return (
        {"input_ids": ids[:1], "attention_mask": mask[:1]},
        {"input_ids": ids[1:], "attention_mask": mask[1:]},
    )


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    difference = (a.double() - b.double()).abs().max()
    return bool(difference <= TOLERANCE[a.dtype] * b.double().abs().max())


def _guessed(model: StreamedModel) -> str:
    entry = model.architecture
    return f" '{entry.model_type}'" + (", of which the layers were guessed," if entry.guessed else "")


def check_survivors(base: StreamedModel, result: StreamedModel, surviving: Sequence[int]) -> None:
    """Raise `PlanError` unless every surviving layer of `result` is, and is called, as it was in `base`.

    `result` is the model that its configuration makes after layers were removed. A rule in it that does not fit what
    is left (every n-th layer, the last layer always, ...) would silently change layers; this finds it by comparing all
    settings of the modules, the shapes of all weights, and masks and position embeddings.
    """
    _check_outside(base.checkpoint, result.checkpoint)
    removed = sorted({*range(base.layer_count)} - {*surviving})
    given = _sequences(base)[1]
    before, after = Rehearsal(base), Rehearsal(result)
    for new, old in enumerate(surviving):
        change = _difference(base.layers[old], result.layers[new], old, new)
        if not change and not same_call(before.call(old, given), after.call(new, given)):
            change = "it is called with another mask or other positions"
        if change:
            raise PlanError(
                f"layer {old} of {base.checkpoint.name} would not stay what it is if layers {removed} were removed: as "
                f"layer {new}, {change}; choose other --layers, or keep low-rank components in all of them (--keep)."
            )
    scaled = getattr(base.model.config, "scale_attn_by_inverse_layer_idx", False)
    if scaled and list(surviving) != list(range(len(surviving))):
        raise PlanError(
            f"{base.checkpoint.name} scales attention by the number of the layer (scale_attn_by_inverse_layer_idx), "
            "which changes if an earlier layer is removed; remove the last layers only, or keep low-rank components in "
            "all of them (--keep)."
        )


def _check_outside(base: Checkpoint, result: Checkpoint) -> None:
    before, after = base.skeleton.state_dict(), result.skeleton.state_dict()
    for name in base.other_tensors():
        if name not in after or before[name].shape != after[name].shape:
            raise PlanError(
                f"{base.name} keeps something for each layer outside its layers ('{name}'), so layers cannot be "
                "removed from it; keep low-rank components in all of them instead (--keep)."
            )


def _difference(before: nn.Module, after: nn.Module, old: int, new: int) -> str:
    """Say in what a layer differs from what it was; "" if in nothing."""
    theirs = dict(after.named_modules())
    for name, module in before.named_modules():
        other = theirs.get(name)
        if other is None or type(other) is not type(module):
            return f"it has another '{name}'"
        for attribute, value in vars(module).items():
            if not isinstance(value, int | float | str | bool | None) or attribute in _NUMBER_OF_LAYER:
                continue
            now = getattr(other, attribute, None)
            if now != value and (value, now) != (old, new):
                return f"'{f'{name}.{attribute}'.lstrip('.')}' is {now} instead of {value}"
    shapes, new_shapes = ({n: p.shape for n, p in layer.state_dict().items()} for layer in (before, after))
    if shapes != new_shapes:
        changed = sorted(n for n in {*shapes, *new_shapes} if shapes.get(n) != new_shapes.get(n))
        return f"'{changed[0]}' has another shape"
    return ""
