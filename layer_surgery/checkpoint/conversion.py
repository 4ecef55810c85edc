"""Tensors under the names and in the form that a model has, made lazily of those that a checkpoint stores, and back.

The two differ in three ways: names have changed over time, transformers stacks the experts of a layer into one tensor
when it loads them, and GPT-2 stores its matrices transposed. The rules for the first two are transformers' own; they
are applied to names alone when a checkpoint is opened, and to tensors when these are read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from layer_surgery.checkpoint.tensors import TensorSource, TensorSpec
from layer_surgery.errors import CheckpointError


def as_in_model(source: TensorSource, model: PreTrainedModel) -> tuple[TensorSource, list[str]]:
    """Return stored tensors as `model` (a skeleton) has them, and the names of those that it has no place for.

    Raises `CheckpointError` for tensors that should become one and do not go together.
    """
    renamings, converters = _sorted_out(get_model_conversion_mapping(model))
    known = model.state_dict()
    groups: dict[str, _Group] = {}
    without_place: list[str] = []
    for name in sorted(source.specs, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if key not in known and name in known:
            key, pattern = name, None
        if key not in known:
            without_place.append(name)
            continue
        if pattern is None and key in groups:
            raise CheckpointError(
                f"the tensors '{groups[key].members[0][1]}' and '{name}' of the checkpoint are both '{key}' of the "
                "model; download the checkpoint again."
            )
        _collect(groups, converters, key, pattern, name)
    for group in groups.values():
        _check_numbers(group)
    converted = ConvertedSource(source, groups.values(), model)
    return with_conv1d_transposed(converted, model), without_place


def as_stored(source: TensorSource, model: PreTrainedModel) -> TensorSource:
    """Return tensors of `model` (a skeleton) in the form in which transformers' `save_pretrained` writes them."""
    # As `revert_weight_conversion` does: what only helps to read other layouts is not undone.
    rules = [
        rule.reverse_transform()
        for rule in reversed(get_model_conversion_mapping(model, add_legacy=False))
        if not isinstance(rule, PrefixChange)
    ]
    renamings, converters = _sorted_out(rules)
    groups: dict[str, _Group] = {}
    for name in source.specs:
        key, pattern = apply_converters(name, converters)
        if pattern is None:
            key = apply_renamings(name, renamings)
        _collect(groups, converters, key, pattern, name, renamings)
    return ConvertedSource(with_conv1d_transposed(source, model), groups.values(), model)


def with_conv1d_transposed(source: TensorSource, model: nn.Module) -> TensorSource:
    """Return tensors with those of every `Conv1D` the other way round; doing it twice changes nothing."""
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LinearFromConv1D)}
    return TransposedSource(source, names) if names else source


class LinearFromConv1D(nn.Linear):
    """Stands for GPT-2's `Conv1D`, with its weight the other way round: [out, in], as everywhere else."""


def replace_conv1d(model: nn.Module) -> None:
    """Replace every `Conv1D` on the meta device, so that nothing else has to know about transposed weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                in_features, out_features = child.weight.shape
                dtype = child.weight.dtype
                setattr(parent, name, LinearFromConv1D(in_features, out_features, device="meta", dtype=dtype))


class ConvertedSource:
    """Tensors of another source after renaming and regrouping.

    Of a group that makes several tensors, those that were not asked for yet stay in memory until they are, or until
    another group is read: reading one by one in the order of `specs` makes every group once.
    """

    def __init__(self, source: TensorSource, groups: Iterable[_Group], model: PreTrainedModel) -> None:
        self._source, self._model = source, model
        self._group_of: dict[str, _Group] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._waiting: dict[str, Tensor] = {}
        for group in groups:
            for name, spec in self._specs_of(group).items():
                self.specs[name], self._group_of[name] = spec, group

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        renamed: dict[str, str] = {}
        for name in names:
            group = self._group_of[name]
            if group.converter is None:
                renamed[name] = group.members[0][1]
                continue
            if name not in self._waiting or self._waiting[name].device != device:
                self._waiting = {}
                members = self._source.read([member for _pattern, member in group.members], device)
                self._waiting = group.convert(members, self._model)
            tensors[name] = self._waiting.pop(name)
        if renamed:
            read = self._source.read(dict.fromkeys(renamed.values()), device)
            tensors |= {new: read[old] for new, old in renamed.items()}
        return tensors

    def _specs_of(self, group: _Group) -> dict[str, TensorSpec]:
        """Return what a group makes, by converting tensors that have shapes only."""
        specs = self._source.specs
        if group.converter is None:
            return {group.key: specs[group.members[0][1]]}
        shapes = {
            name: torch.empty(specs[name].shape, dtype=specs[name].dtype, device="meta") for _, name in group.members
        }
        try:
            made = group.convert(shapes, self._model)
        except Exception as error:  # transformers raises what it likes about tensors that do not go together
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"the tensors that make up '{group.key}', the first being '{group.members[0][1]}', do not go together "
                f"({reason}); is the download complete?"
            ) from error
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}


class TransposedSource:
    """Tensors of another source, of which the named matrices are transposed."""

    def __init__(self, source: TensorSource, names: Iterable[str]) -> None:
        self._source, self._names = source, frozenset(names)
        self.specs = {
            name: TensorSpec(spec.shape[::-1], spec.dtype) if name in self._names else spec
            for name, spec in source.specs.items()
        }

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        read = self._source.read(names, device)
        return {name: tensor.T if name in self._names else tensor for name, tensor in read.items()}


@dataclass
class _Group:
    """Tensors that are made together, of tensors that are needed together."""

    key: str  #: The name of the (first) tensor that is made.
    converter: WeightConverter | None  #: None: one tensor, renamed.
    renamings: Sequence[WeightRenaming] = ()  #: Changes of the names that the converter gives.
    members: list[tuple[str, str]] = field(default_factory=list)
    """(pattern of the converter, name in the source) of each tensor that goes in."""

    def convert(self, tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        converter = copy.deepcopy(self.converter)
        assert converter is not None, "a tensor that is renamed only is not converted"
        for pattern, name in self.members:
            converter.add_tensor(self.key, name, pattern, tensors[name])
        made: dict[str, Any] = converter.convert(self.key, model=model, config=model.config)
        return {
            apply_renamings(name, self.renamings): value[0] if isinstance(value, list) else value
            for name, value in made.items()
        }


def _collect(
    groups: dict[str, _Group],
    converters: Sequence[WeightConverter],
    key: str,
    pattern: str | None,
    name: str,
    renamings: Sequence[WeightRenaming] = (),
) -> None:
    """Add a tensor to the group that makes `key`."""
    converter = next((c for c in reversed(converters) if pattern in c.source_patterns), None)
    groups.setdefault(key, _Group(key, converter, renamings)).members.append((pattern or "", name))


def _check_numbers(group: _Group) -> None:
    """Raise `CheckpointError` unless the names of tensors that become one differ in their numbers 0, 1, ... only.

    transformers would take them in the order of their names, whatever these are.
    """
    by_pattern: dict[str, list[str]] = {}
    for pattern, name in group.members:
        by_pattern.setdefault(pattern, []).append(name)
    for names in by_pattern.values():
        parts = [name.split(".") for name in names]
        if len(names) == 1:
            continue
        differ = [each for each in zip_longest(*parts, fillvalue="") if len(set(each)) > 1]
        numbers = sorted(int(part) for part in differ[0] if part.isdecimal()) if len(differ) == 1 else []
        if numbers != list(range(len(names))):
            raise CheckpointError(
                f"the {len(names)} tensors that make up '{group.key}', the first being '{names[0]}', are not numbered "
                f"0 to {len(names) - 1}; download the checkpoint again."
            )


def _sorted_out(rules: Sequence[Any]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )
