"""The walk: a model's decoder layers one after another, with the hidden states at the boundaries kept outside.

Memory is bounded by the embeddings, one decoder layer and a micro-batch; boundaries go to a `BoundaryStore`.
Shapes: B sequences in a micro-batch, S tokens each, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError
from layer_surgery.journal import NO_STEPS, Journal, Steps
from layer_surgery.linalg.decomposition import Decomposition
from layer_surgery.progress import Progress, no_progress
from layer_surgery.walk.boundaries import Boundary, BoundaryStore
from layer_surgery.walk.embedding import curvature_probes, embedding_losses, probe_generator
from layer_surgery.walk.finite import Finite, remedy
from layer_surgery.walk.losses import losses, targets
from layer_surgery.walk.observer import Observer
from layer_surgery.walk.rehearsal import Rehearsal, blocks
from layer_surgery.walk.share import share_of
from layer_surgery.walk.streamed import StreamedModel

#: Logits of at most this many elements exist at a time (128 MiB in float32).
LOGITS_AT_A_TIME = 1 << 25

_STREAM = -1
"""Slot of the latest boundary of a walk that keeps no other."""


@dataclass(frozen=True, kw_only=True)
class WalkSettings:
    """Memory that a walk may take, its progress, and how what it sees is decomposed.

    Only the last changes what is computed.
    """

    batch_size: int = 8
    boundary_memory_bytes: int = 1 << 29
    scratch: Path = Path()
    progress: Progress = no_progress
    decomposition: Decomposition = "auto"


@dataclass(frozen=True)
class Losses:
    """Summed loss of every sequence, and the number of tokens it is over (1 where there is one answer a sequence)."""

    sums: Tensor  # [N] float64, in nats but for a regression
    tokens: Tensor  # [N] int64

    @property
    def mean(self) -> float:
        """Loss per token, or per sequence, that carries any."""
        return float(self.sums.sum() / self.tokens.sum())


class Walk:
    """Walks one model over one set of packed tokens, or over this process's share of them.

    The boundary before the k-th layer of a kept walk is in slot k. A context manager: frees its boundaries on exit.
    """

    def __init__(self, model: StreamedModel, tokens: PackedTokens, settings: WalkSettings) -> None:
        self.model, self.settings = model, settings
        self.all_tokens = tokens
        """Those of all processes; `tokens` are what this one walks over, and all rows are rows of these."""
        self.share = share_of(tokens, settings.batch_size)
        self.tokens = self.share.tokens
        self.rehearsal = Rehearsal(model)
        self.store = self.new_store()
        self._kept: list[int] | None = None  # the path whose boundaries are in slots 0, 1, ...; None: not even slot 0

    def new_store(self, memory_bytes: int | None = None) -> BoundaryStore:
        """Return an empty store for boundaries of these tokens; the caller closes it."""
        memory_bytes = self.settings.boundary_memory_bytes if memory_bytes is None else memory_bytes
        shape = (self.tokens.sequences, self.tokens.sequence_length, self.model.hidden_size)
        return BoundaryStore(shape, self.model.dtype, self.model.device, memory_bytes, self.settings.scratch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def boundary(self, position: int) -> Boundary:
        """Return the boundary before the layer at this position of the kept path (behind the last: after it)."""
        return Boundary(self.store, position)

    def batches(self) -> Iterator[slice]:
        return (rows for rows, _present in self.share.rounds if rows is not None)

    def rows_of_all(self, own: Tensor) -> Tensor:
        """Return [N, ...] for all sequences, of what each process has found for its own [n, ...], on the CPU."""
        return parallel.rows_of_all(own, self.share.windows, self.all_tokens.sequences)

    def forward(
        self,
        path: Sequence[int],
        *,
        keep: bool,
        observers: Sequence[Observer] = (),
        watch: Iterable[int] | None = None,
        steps: Steps = NO_STEPS,
    ) -> Boundary:
        """Walk through the layers of `path` and return the last boundary.

        With `keep` the boundary before `path[k]` stays in slot k, and what an earlier walk has left there is used
        again as far as its path was the same (not if there are observers). Without, only the latest boundary is held.
        Observers see the layers in `watch` (default: all). Layers that are finished in `steps` are not run again, and
        those that are run are finished there; with an observer, there is one.
        """
        watched = set(path if watch is None else watch)
        known = self._kept or []
        if self._kept is None:
            self._embed()
        start = 0
        while keep and not observers and start < min(len(known), len(path)) and known[start] == path[start]:
            start += 1
        if keep:
            self._kept = list(path[:start])
        latest = self.boundary(start)
        finished = steps.leading(map(str, path))
        for position in range(len(finished), start):
            steps.finish(str(path[position]), kept=self.boundary(position + 1).save)
        with self.settings.progress("forward", len(path) - start) as advance:
            for position, index in enumerate(path[start:], start):
                source, latest = latest, self.boundary(position + 1 if keep else _STREAM)
                seeing = observers if index in watched else ()
                if position < len(finished):
                    step = finished[position]
                    for observer in seeing:
                        observer.restore(index, step)
                    if keep or position == len(finished) - 1:
                        latest.load(step.kept if keep else step.passing)
                else:
                    following = path[position + 1] if position + 1 < len(path) else None
                    self.step(index, source, latest, seeing, ahead=following)
                    _finish(steps, index, latest, seeing, keep=keep)
                if self._kept is None:
                    self.store.drop(0)
                elif keep:
                    self._kept.append(index)
                advance()
        return latest

    def _embed(self) -> None:
        finite = Finite(self.model, "the embeddings")
        for rows in self.batches():
            embedded = self.rehearsal.embed(self.tokens.inputs(rows))
            finite.see(embedded, self.tokens.valid[rows].to(self.model.device))
            self.boundary(0).write(rows, embedded)
        finite.check()

    def forget(self, position: int) -> None:
        """Say that the layer at this position of the kept path has changed: later boundaries are not used again."""
        if self._kept is not None:
            self._kept = self._kept[:position]

    @torch.no_grad()
    def step(
        self,
        index: int,
        source: Boundary,
        target: Boundary,
        observers: Sequence[Observer] = (),
        *,
        ahead: int | None = None,
    ) -> None:
        """Take the hidden states at `source` through layer `index` to `target` (which may be the same).

        `ahead` is the layer that comes next, if that is known: it is read meanwhile.
        """
        with self.model.layer(index, ahead) as layer, ExitStack() as watching:
            for observer in observers:
                watching.enter_context(observer.watching(index, layer))
            finite = Finite(self.model, f"the hidden states after layer {index}")
            for rows, present in self._rounds(source):
                if rows is not None:
                    before = source.read(rows)
                    valid = self._announce(rows, observers)
                    after = self._call(index, rows)(layer, before)
                    finite.see(after, valid)
                    for observer in observers:
                        observer.boundaries(index, before, after, valid)
                    target.write(rows, after)
                for observer in observers:
                    observer.end_round(present)
            finite.check()

    def _rounds(self, *read: Boundary) -> Iterator[tuple[slice | None, int]]:
        """Yield the rounds; while one is worked on, what these boundaries hold for the next is read ahead."""
        rounds = self.share.rounds
        for number, (rows, present) in enumerate(rounds):
            following = rounds[number + 1][0] if number + 1 < len(rounds) else None
            if following is not None:
                for boundary in read:
                    boundary.read_ahead(following)
            yield rows, present

    def _announce(self, rows: slice, observers: Sequence[Observer]) -> Tensor:
        valid = self.tokens.valid[rows].to(self.model.device)
        for observer in observers:
            observer.batch(valid)
        return valid

    def _call(self, index: int, rows: slice) -> Callable[[nn.Module, Tensor], Tensor]:
        return self.rehearsal.call(index, self.tokens.inputs(rows))

    def losses(self, last: Boundary, gradient: Boundary | None = None) -> Losses:
        """Return the losses of all sequences that follow from the last boundary.

        With `gradient`, also write the gradient of the summed loss with respect to that boundary there.
        Raises `NumericalError` if a loss is not finite.
        """
        if self.tokens.objective.problem == "embedding":
            return self._embedding_losses(last, gradient)
        sums = torch.zeros(self.tokens.sequences, dtype=torch.float64)
        with self.settings.progress("head", self.tokens.sequences) as advance:
            for rows in self.batches():
                hidden = last.read(rows)
                grad = torch.zeros_like(hidden) if gradient is not None else None
                sums[rows] = self._batch_losses(hidden, rows, grad)
                if gradient is not None and grad is not None:
                    gradient.write(rows, grad)
                for _ in range(rows.stop - rows.start):
                    advance()
        return self._checked_losses(self.rows_of_all(sums))

    def _checked_losses(self, sums: Tensor) -> Losses:
        bad = (~torch.isfinite(sums)).nonzero().flatten().tolist()
        if bad:
            raise NumericalError(
                f"the loss of {self.model.checkpoint.name} on '{self.tokens.name}' is not finite in "
                f"{len(bad)} of {len(sums)} windows (the first is window {bad[0]}); {remedy(self.model.dtype)}."
            )
        return Losses(sums, self.all_tokens.loss_mask.sum(dim=1))

    def _embedding_losses(self, last: Boundary, gradient: Boundary | None) -> Losses:
        """Return the losses of embeddings, which are of all texts together; the labels are the teacher's vectors.

        The gradient is that of probes of the loss's second derivative (`embedding.py`), for at the original, where
        gradients are taken, the loss itself has none.
        """
        vectors = self.embeddings(last)
        assert self.tokens.labels is not None
        sums = embedding_losses(vectors, self.tokens.labels.to(vectors))
        if gradient is not None:
            directions = curvature_probes(vectors, probe_generator(self.tokens.sha256))
            for rows in self.batches():
                hidden = last.read(rows)
                with torch.enable_grad():
                    piece = hidden.detach().requires_grad_()
                    given = self.rehearsal.head(piece, self.tokens.inputs(rows))
                    given.backward(directions[rows].to(given))  # type: ignore[no-untyped-call]
                assert piece.grad is not None
                gradient.write(rows, piece.grad)
        return self._checked_losses(sums)

    @torch.no_grad()
    def embeddings(self, last: Boundary) -> Tensor:
        """Return what an embedding model gives for each of the walk's texts, [N, E] float64 on the CPU."""
        with self.settings.progress("head", self.tokens.sequences) as advance:
            parts = []
            for rows in self.batches():
                parts.append(self.rehearsal.head(last.read(rows), self.tokens.inputs(rows)).double().cpu())
                for _ in range(rows.stop - rows.start):
                    advance()
        return torch.cat(parts)

    def _batch_losses(self, hidden: Tensor, rows: slice, grad: Tensor | None) -> Tensor:
        """Return the summed loss [B] float64 of a micro-batch; add the gradient to `grad` [B, S, D] if given."""
        sums = torch.zeros(len(hidden), dtype=torch.float64)
        for block, labels, inputs in self._head_calls(rows, hidden.device):
            with torch.set_grad_enabled(grad is not None):
                piece = hidden[block].detach().requires_grad_(grad is not None)
                found = losses(self.rehearsal.head(piece, inputs), labels, self.tokens.objective)
                if grad is not None:
                    found.sum().backward()  # type: ignore[no-untyped-call]
                    assert piece.grad is not None
                    grad[block] = piece.grad
            sums[block[0]] += found.detach().double().view(len(found), -1).sum(dim=1).cpu()
        return sums

    def _head_calls(
        self, rows: slice, device: torch.device
    ) -> Iterator[tuple[tuple[slice, slice], Tensor, dict[str, Tensor] | None]]:
        """Yield the parts of a micro-batch that the head is called with one by one, each with its labels and, where
        the head looks at them, the inputs of the model."""
        labels, objective = targets(self.tokens, rows).to(device), self.tokens.objective
        if objective.of_sequences:
            yield (slice(None), slice(None)), labels, self.tokens.inputs(rows)
            return
        for block in blocks(labels.shape, LOGITS_AT_A_TIME // self.model.vocabulary_size):
            if (labels[block] != NO_LABEL).any():
                yield block, labels[block], None

    @torch.no_grad()
    def predictions(self, last: Boundary) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what the head gives behind the last boundary, part by part: sequences, logits and labels.

        The logits [n, V or L] are those of tokens with a label, or of sequences; the labels are as in `targets`, and
        the tensor of sequences [n] says to which of the walk each belongs.
        """
        for rows in self.batches():
            hidden = last.read(rows)
            numbers = torch.arange(rows.start, rows.stop, device=hidden.device)
            for block, labels, inputs in self._head_calls(rows, hidden.device):
                logits = self.rehearsal.head(hidden[block], inputs)
                if self.tokens.objective.of_sequences:
                    yield numbers, logits, labels
                else:
                    known = labels != NO_LABEL
                    yield numbers[block[0], None].expand_as(labels)[known], logits[known], labels[known]

    def backpropagate(
        self,
        observers: Sequence[Observer],
        *,
        watch: Iterable[int] | None = None,
        forward: Steps = NO_STEPS,
        steps: Steps = NO_STEPS,
    ) -> None:
        """Walk forward through all layers, to the summed loss, and back as far as the first layer in `watch`.

        Observers see the layers in `watch` (default: all) on the way back. The boundaries stay, as `forward` keeps
        them. Layers that are finished in `forward`, and in `steps` on the way back, are not run again.
        """
        path = range(self.model.layer_count)
        watched = set(path if watch is None else watch)
        back = path[min(watched) :][::-1]
        finished = steps.leading(map(str, back))
        with self.new_store() as store:
            gradient = Boundary(store, 0)
            if not finished:
                last = self.forward(path, keep=True, steps=forward)
                self.model.read_ahead(path[-1])
                self.losses(last, gradient)
            elif len(finished) < len(back):
                self.forward(path, keep=True, steps=forward)
                gradient.load(finished[-1].passing)
            for observer in observers:
                observer.begin_backward(gradient)
            with self.settings.progress("backward", len(back)) as advance:
                for position, index in enumerate(back):
                    seeing = observers if index in watched else ()
                    if position < len(finished):
                        for observer in seeing:
                            observer.restore(index, finished[position])
                    else:
                        ahead = back[position + 1] if position + 1 < len(back) else None
                        self._step_back(index, gradient, seeing, ahead)
                        _finish(steps, index, gradient, seeing, keep=False)
                    advance()

    def _step_back(self, index: int, gradient: Boundary, observers: Sequence[Observer], ahead: int | None) -> None:
        """Recompute layer `index` from the boundary before it and take `gradient` from after it to before it.

        While observers leave the layer, the gradient after it is still there. Uses the slot behind `gradient` too.
        """
        new = Boundary(gradient.store, gradient.slot + 1)
        with self.model.layer(index, ahead) as layer, ExitStack() as watching:
            for observer in observers:
                watching.enter_context(observer.watching(index, layer))
            finite = Finite(self.model, f"the gradients before layer {index}")
            for rows, present in self._rounds(self.boundary(index), gradient):
                if rows is not None:
                    with torch.enable_grad():
                        valid = self._announce(rows, observers)
                        before = self.boundary(index).read(rows).detach().requires_grad_()
                        after = self._call(index, rows)(layer, before)
                        after.backward(gradient.read(rows))  # type: ignore[no-untyped-call]
                    assert before.grad is not None
                    finite.see(before.grad, valid)
                    new.write(rows, before.grad)
                for observer in observers:
                    observer.end_round(present)
            finite.check()
        gradient.store.exchange(gradient.slot, new.slot)


def boundary_steps(journal: Journal, walk: Walk) -> Steps:
    """Return where a walk over the layers of the original keeps the boundaries behind them."""
    return journal.stage("boundaries", walk.all_tokens.sha256)


def _finish(steps: Steps, index: int, latest: Boundary, observers: Sequence[Observer], *, keep: bool) -> None:
    """Finish the step of a layer, with the boundary that the next layer needs, and with what an observer has seen."""
    if steps is NO_STEPS:
        return
    if not observers:
        steps.finish(str(index), kept=latest.save if keep else None, passing=None if keep else latest.save)
    for observer in observers:
        observer.finish(index, steps, latest.save)
