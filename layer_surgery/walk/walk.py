"""The walk: a model's decoder layers one after another, with the hidden states at the boundaries kept outside.

Memory is bounded by the embeddings, one decoder layer and a micro-batch; boundaries go to a `BoundaryStore`.
Shapes: B sequences in a micro-batch, S tokens each, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError
from layer_surgery.progress import Progress, no_progress
from layer_surgery.walk.boundaries import BoundaryStore
from layer_surgery.walk.rehearsal import Rehearsal
from layer_surgery.walk.streamed import StreamedModel

#: Logits of at most this many elements exist at a time (128 MiB in float32).
LOGITS_AT_A_TIME = 1 << 25

_STREAM = -1
"""Slot of the latest boundary of a walk that keeps no other."""


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """How a walk uses memory. None of this changes what is computed."""

    batch_size: int = 8
    boundary_memory_bytes: int = 1 << 29
    scratch: Path = Path()
    progress: Progress = no_progress


class Observer:
    """Sees every layer as the walk passes. Reduces on the spot; holds nothing of the size of the data."""

    def watching(self, index: int, layer: nn.Module) -> AbstractContextManager[None]:
        """Entered before the first micro-batch of layer `index`, left after its last: hooks go in, hooks come out."""
        return nullcontext()

    def batch(self, valid: Tensor) -> None:
        """Before each micro-batch: which of its tokens are no padding, [B, S] bool on the device."""

    def boundaries(self, index: int, before: Tensor, after: Tensor, valid: Tensor) -> None:
        """Forward walk only: hidden states [B, S, D] at both sides of layer `index`; `valid` [B, S] bool."""


@dataclass(frozen=True)
class Losses:
    """Summed next-token cross-entropy of every sequence, in nats, and the number of tokens it is over."""

    sums: Tensor  # [N] float64
    tokens: Tensor  # [N] int64

    @property
    def mean(self) -> float:
        """Nats per predicted token."""
        return float(self.sums.sum() / self.tokens.sum())


class Walk:
    """Walks one model over one set of packed tokens.

    The boundary before the k-th layer of a kept walk is in slot k. A context manager: frees its boundaries on exit.
    """

    def __init__(self, model: StreamedModel, tokens: PackedTokens, settings: WalkSettings) -> None:
        self.model, self.tokens, self.settings = model, tokens, settings
        self.rehearsal = Rehearsal(model)
        self.store = self.new_store(settings.boundary_memory_bytes)
        self._kept: list[int] | None = None  # the path whose boundaries are in slots 0, 1, ...; None: not even slot 0

    def new_store(self, memory_bytes: int) -> BoundaryStore:
        """Return an empty store for boundaries of these tokens; the caller closes it."""
        shape = (self.tokens.sequences, self.tokens.sequence_length, self.model.hidden_size)
        return BoundaryStore(shape, self.model.dtype, self.model.device, memory_bytes, self.settings.scratch)

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def batches(self) -> Iterator[slice]:
        return self.tokens.batches(self.settings.batch_size)

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        path: Sequence[int],
        *,
        keep: bool,
        observers: Sequence[Observer] = (),
        watch: Iterable[int] | None = None,
    ) -> int:
        """Walk through the layers of `path` and return the slot that then holds the last boundary.

        With `keep` the boundary before `path[k]` stays in slot k, and what an earlier walk has left there is used
        again as far as its path was the same (not if there are observers). Without, only the latest boundary is held.
        Observers see the layers in `watch` (default: all).
        """
        watched = set(path if watch is None else watch)
        known = self._kept
        if known is None:
            self._embed()
            known = []
        if not keep:
            return self._stream(path, observers, watched)
        start = 0
        while not observers and start < min(len(known), len(path)) and known[start] == path[start]:
            start += 1
        self._kept = list(path[:start])
        with self.settings.progress("forward", len(path) - start) as advance:
            for position in range(start, len(path)):
                index = path[position]
                seen_by = observers if index in watched else ()
                self.step(index, (self.store, position), (self.store, position + 1), seen_by)
                self._kept.append(path[position])
                advance()
        return len(path)

    def forget(self, position: int) -> None:
        """Say that the layer at this position of the kept path has changed: later boundaries are not used again."""
        if self._kept is not None:
            self._kept = self._kept[:position]

    def _stream(self, path: Sequence[int], observers: Sequence[Observer], watched: set[int]) -> int:
        slot = 0
        with self.settings.progress("forward", len(path)) as advance:
            for index in path:
                self.step(index, (self.store, slot), (self.store, _STREAM), observers if index in watched else ())
                if slot == 0 and self._kept is None:
                    self.store.drop(0)
                slot = _STREAM
                advance()
        return slot

    def _embed(self) -> None:
        """Write the first boundary to slot 0."""
        for rows in self.batches():
            self.store.write(0, rows, self.rehearsal.embed(self.tokens.token_ids[rows]))

    @torch.no_grad()
    def step(
        self,
        index: int,
        source: tuple[BoundaryStore, int],
        target: tuple[BoundaryStore, int],
        observers: Sequence[Observer] = (),
    ) -> None:
        """Take the boundary in slot `source` through layer `index` to slot `target` (which may be the same)."""
        with self.model.layer(index) as layer, ExitStack() as watching:
            for observer in observers:
                watching.enter_context(observer.watching(index, layer))
            for rows in self.batches():
                before = source[0].read(source[1], rows)
                valid = self._announce(rows, observers)
                after = self._call(index, rows)(layer, before)
                for observer in observers:
                    observer.boundaries(index, before, after, valid)
                target[0].write(target[1], rows, after)

    def _announce(self, rows: slice, observers: Sequence[Observer]) -> Tensor:
        valid = self.tokens.valid[rows].to(self.model.device)
        for observer in observers:
            observer.batch(valid)
        return valid

    def _call(self, index: int, rows: slice) -> Callable[[nn.Module, Tensor], Tensor]:
        return self.rehearsal.call(index, self.tokens.token_ids[rows])

    # -- head ------------------------------------------------------------------------------------------------------

    def losses(
        self, slot: int, store: BoundaryStore | None = None, gradient: tuple[BoundaryStore, int] | None = None
    ) -> Losses:
        """Return the losses that follow from the last boundary, in `slot`.

        With `gradient`, also write the gradient of the summed loss with respect to that boundary there.
        Raises `NumericalError` if a loss is not finite.
        """
        store = store or self.store
        sums = torch.zeros(self.tokens.sequences, dtype=torch.float64)
        with self.settings.progress("head", self.tokens.sequences) as advance:
            for rows in self.batches():
                hidden = store.read(slot, rows)
                grad = torch.zeros_like(hidden) if gradient is not None else None
                sums[rows] = self._batch_losses(hidden, rows, grad)
                if gradient is not None and grad is not None:
                    gradient[0].write(gradient[1], rows, grad)
                for _ in range(rows.stop - rows.start):
                    advance()
        bad = (~torch.isfinite(sums)).nonzero().flatten().tolist()
        if bad:
            raise NumericalError(
                f"the loss of {self.model.checkpoint.name} on '{self.tokens.name}' is not finite in "
                f"{len(bad)} of {self.tokens.sequences} windows (the first is window {bad[0]}); "
                "try --dtype float32, and check the checkpoint."
            )
        return Losses(sums, self.tokens.loss_mask.sum(dim=1))

    def _batch_losses(self, hidden: Tensor, rows: slice, grad: Tensor | None) -> Tensor:
        """Return the summed loss [B] float64 of a micro-batch; add the gradient to `grad` [B, S, D] if given."""
        ids, mask = self.tokens.token_ids[rows], self.tokens.loss_mask[rows]
        batch, length = ids.shape
        # The label of position t is token t + 1: shifted here, once, and nowhere else.
        labels = torch.full((batch, length), -100)
        labels[:, :-1] = torch.where(mask[:, 1:], ids[:, 1:], -100)
        labels = labels.to(hidden.device)
        sums = torch.zeros(batch, dtype=torch.float64)
        tokens_at_a_time = max(1, LOGITS_AT_A_TIME // self.model.vocabulary_size)
        row_step, column_step = max(1, tokens_at_a_time // length), min(length, tokens_at_a_time)
        for row in range(0, batch, row_step):
            for column in range(0, length, column_step):
                part = (slice(row, row + row_step), slice(column, column + column_step))
                if not (labels[part] != -100).any():
                    continue
                with torch.set_grad_enabled(grad is not None):
                    piece = hidden[part].detach().requires_grad_(grad is not None)
                    losses = self._token_losses(self.rehearsal.head(piece), labels[part])
                    if grad is not None:
                        losses.sum().backward()  # type: ignore[no-untyped-call]
                        assert piece.grad is not None
                        grad[part] = piece.grad
                sums[part[0]] += losses.detach().double().sum(dim=1).cpu()
        return sums

    @staticmethod
    def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy [b, s], zero where the label is -100, in float32 or better."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        flat = rearrange(logits, "batch sequence vocabulary -> (batch sequence) vocabulary")
        losses = nn.functional.cross_entropy(flat, labels.flatten(), reduction="none", ignore_index=-100)
        return losses.view(labels.shape)

    # -- backward --------------------------------------------------------------------------------------------------

    def backward(
        self,
        path: Sequence[int],
        gradient: tuple[BoundaryStore, int],
        *,
        stop: int = 0,
        observers: Sequence[Observer] = (),
        watch: Iterable[int] | None = None,
    ) -> None:
        """Walk back through `path[stop:]` from the last layer on, with every boundary k in slot k.

        `gradient` holds the gradient at the last boundary and is overwritten; at the end it is that before
        `path[stop]`. Observers see the layers in `watch` (default: all). Layers before `path[stop]` are not
        touched.
        """
        watched = set(path if watch is None else watch)
        with self.settings.progress("backward", len(path) - stop) as advance:
            for position in reversed(range(stop, len(path))):
                index = path[position]
                self.step_back(index, position, gradient, observers if index in watched else ())
                advance()

    def step_back(
        self, index: int, slot: int, gradient: tuple[BoundaryStore, int], observers: Sequence[Observer] = ()
    ) -> None:
        """Recompute layer `index` from the boundary in `slot` and take `gradient` from after it to before it.

        While observers leave the layer, the gradient after it is still there. Uses the slot behind `gradient` too.
        """
        store, gradient_slot = gradient
        with self.model.layer(index) as layer, ExitStack() as watching:
            for observer in observers:
                watching.enter_context(observer.watching(index, layer))
            for rows in self.batches():
                with torch.enable_grad():
                    self._announce(rows, observers)
                    before = self.store.read(slot, rows).detach().requires_grad_()
                    after = self._call(index, rows)(layer, before)
                    after.backward(store.read(gradient_slot, rows))  # type: ignore[no-untyped-call]
                assert before.grad is not None
                store.write(gradient_slot + 1, rows, before.grad)
        store.exchange(gradient_slot, gradient_slot + 1)
