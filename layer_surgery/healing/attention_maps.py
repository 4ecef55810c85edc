"""What the loss `attention` compares: the scores of pairs of layers, before the softmax, as in TinyBERT.

Queries and keys are taken where the model hands them to transformers' attention function, positions and norms included,
so both models attend as they always do, and scores exist for one window of one layer at a time. Heads correspond only
between a layer and itself: layer k of the student is compared with the one of the original that it was, other than
hidden states. Shapes: B windows of S tokens, P rows of R tokens as they were run, H heads, K of keys, d of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layer_surgery.checkpoint.attention import queries_keys_values
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.errors import CheckpointError
from layer_surgery.healing.losses.inputs import AttentionPair
from layer_surgery.healing.mixture import WeightedLoss

#: The attention function whose masks are read here.
_FUNCTION = "sdpa"


@dataclass(frozen=True)
class Attended:
    """What one layer attended with."""

    query: Tensor  #: [P, H, R, d]
    key: Tensor  #: [P, K, R, d], K a divisor of H
    mask: Tensor | None  #: [P or 1, H or 1, R, R], bool or added to the scores; None: as `causal` says.
    scale: float
    causal: bool

    def scores(self, row: int, tokens: slice) -> Tensor:
        """Return the scores [1, H, s, s] of some tokens of a row, float32 or better."""
        query, key = (each[row : row + 1, :, tokens] for each in (self.query, self.key))
        dtype = torch.promote_types(query.dtype, torch.float32)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).to(dtype)
        return (query.to(dtype) @ key.transpose(-1, -2)) * self.scale

    def visible(self, row: int, tokens: slice) -> Tensor:
        """Return which of some tokens of a row see which [1, s, s] bool; one mask for all heads."""
        if self.mask is None:
            size = len(range(*tokens.indices(self.query.shape[2])))
            seen = torch.ones(1, size, size, dtype=torch.bool, device=self.query.device)
            return seen.tril() if self.causal else seen
        mask = self.mask[min(row, len(self.mask) - 1), :1, tokens, tokens]
        return mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min / 2


class AttentionMaps:
    """The layers of student and original whose scores are compared."""

    def __init__(self, student: Checkpoint, teacher: Checkpoint, surviving: Sequence[int]) -> None:
        """Find the layers; raises `CheckpointError` where there are none (see `compared_layers`)."""
        self.pairs, self.left_out = compared_layers(student, teacher, surviving)
        self._names = {position: attention_name(student, position) for position, _ in self.pairs}
        self._theirs = {layer: attention_name(teacher, layer) for _, layer in self.pairs}

    def of_student(self, layers: nn.ModuleList) -> AbstractContextManager[dict[int, Attended]]:
        """Within the block, what the student's layers attend with is put into what is yielded, by position."""
        return attended({number: layers[number].get_submodule(name) for number, name in self._names.items()})

    def of_teacher(self, layers: nn.ModuleList) -> AbstractContextManager[dict[int, Attended]]:
        """The same of the original's layers, by their numbers."""
        return attended({number: layers[number].get_submodule(name) for number, name in self._theirs.items()})

    def values(
        self,
        loss: WeightedLoss,
        students: Mapping[int, Attended],
        teachers: Mapping[int, Attended],
        carries: Tensor,
        places: Sequence[tuple[int, slice]],
    ) -> Tensor:
        """Return the loss of each window [B], a mean over pairs of layers, heads and the places that are seen.

        One layer of one window at a time, whose scores are computed again on the way back.

        Args:
            carries: [B, S] bool, the tokens whose rows are compared.
            places: row of each window, and its tokens there.
        """
        found = []
        for window, (row, tokens) in enumerate(places):
            size = tokens.stop - tokens.start
            rows = carries[window, :size, None]
            values = [
                recomputed(
                    partial(_pair_value, loss, students[position], teachers[layer], row, tokens),
                    rows,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for position, layer in self.pairs
            ]
            found.append(torch.stack(values).mean())
        return torch.stack(found)


def _pair_value(
    loss: WeightedLoss, student: Attended, teacher: Attended, row: int, tokens: slice, carries: Tensor
) -> Tensor:
    with torch.autocast(carries.device.type, enabled=False):
        visible = student.visible(row, tokens) & teacher.visible(row, tokens) & carries
        return loss.value([AttentionPair(student.scores(row, tokens), teacher.scores(row, tokens).detach(), visible)])


def attention_name(checkpoint: Checkpoint, position: int) -> str:
    """Return the name, within a layer, of the module that attends: where its projections are."""
    name = queries_keys_values(checkpoint, position).linears[0]
    return name.rpartition(".")[0]


def compared_layers(
    student: Checkpoint, teacher: Checkpoint, surviving: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Return pairs (position in the student, layer of the original), and the layers of the original that have no pair
    because the surgery took heads, or all of the attention.

    Raises `CheckpointError` if attention is not computed by transformers' functions, or no pair is left.
    """
    for model in (student, teacher):
        function = model.skeleton.config._attn_implementation
        if not getattr(model.skeleton, "_supports_attention_backend", False) or function != _FUNCTION:
            raise CheckpointError(
                f"--loss attention takes scores from transformers' attention functions, which {model.name} "
                f"({model.architecture.model_type}) does not call with '{_FUNCTION}'; use --loss relations."
            )
    pairs, left_out, attends = [], [], 0
    for position, layer in enumerate(surviving):
        heads = _query_width(teacher, layer)
        if heads is None:
            continue  # no attention, or none whose queries are told apart
        attends += 1
        if heads == _query_width(student, position) and not _removed(student, position):
            pairs.append((position, layer))
        else:
            left_out.append(layer)
    if not pairs:
        why = (
            f"all {attends} layers of {student.name} have other numbers of heads than in the original"
            if attends
            else f"no queries can be told apart in the layers of {teacher.name} ({teacher.architecture.model_type})"
        )
        raise CheckpointError(f"--loss attention compares head by head, but {why}; use --loss relations.")
    return pairs, left_out


def _query_width(checkpoint: Checkpoint, position: int) -> int | None:
    try:
        return queries_keys_values(checkpoint, position).widths[0]
    except CheckpointError:
        return None


def _removed(checkpoint: Checkpoint, position: int) -> bool:
    """Return whether the queries of a layer are those of an attention that was taken out: linears of rank 0."""
    prefix = checkpoint.layer_prefix(position)
    return any(
        checkpoint.low_rank.get(prefix + name) == 0 for name in queries_keys_values(checkpoint, position).linears
    )


@contextmanager
def attended(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Attended]]:
    """Within the block, what modules hand to transformers' attention function is put into what is yielded."""
    numbers = {id(module): number for number, module in modules.items()}
    seen: dict[int, Attended] = {}
    plain: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[_FUNCTION]

    def watched(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> Any:
        if id(module) in numbers:
            scale, causal = more.get("scaling"), more.get("is_causal")
            seen[numbers[id(module)]] = Attended(
                query,
                key,
                attention_mask,
                query.shape[-1] ** -0.5 if scale is None else float(scale),
                bool(getattr(module, "is_causal", True) if causal is None else causal),
            )
        return plain(module, query, key, value, attention_mask, **more)

    ALL_ATTENTION_FUNCTIONS[_FUNCTION] = watched
    try:
        yield seen
    finally:
        del ALL_ATTENTION_FUNCTIONS[_FUNCTION]
