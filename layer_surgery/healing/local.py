"""The local stage: each changed layer by itself, from what goes into the original to what comes out of it.

One layer of each model is in memory. Related: Puzzle trains blocks in this way (https://arxiv.org/abs/2411.19146), with
the squared error; here errors are by default priced by the gradients of the original's loss: a change e of the stream
after a layer costs about `1/2 e^T B e` nats, with B the second moment of the gradients there (the Fisher metric).
Shapes: B windows of S tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.trainee import Trainee
from layer_surgery.linalg.least_squares import add_gram
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.observer import Observer
from layer_surgery.walk.rehearsal import Rehearsal
from layer_surgery.walk.walk import Walk


class Place(NamedTuple):
    """A layer of the student and the boundaries of the original between which it stands."""

    position: int  #: In the student.
    before: int  #: Boundary that it reads: number of the original's layers before it.
    after: int  #: Boundary that it is to reach.


class GradientMoments(Observer):
    """Second moments [D, D] of the loss gradient after some layers, over the tokens that are no padding."""

    def __init__(self, walk: Walk) -> None:
        self.moments: dict[int, Tensor] = {}  # by the index of the layer
        self._walk = walk
        self._gradient: Boundary | None = None

    def begin_backward(self, gradient: Boundary) -> None:
        self._gradient = gradient

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        yield
        gradient = self._gradient
        assert gradient is not None, "a backward walk says where its gradient is"
        hidden = self._walk.model.hidden_size
        dtype = torch.promote_types(self._walk.model.dtype, torch.float32)
        total = torch.zeros(hidden, hidden, dtype=dtype, device=self._walk.model.device)
        valid = self._walk.tokens.valid
        for rows in self._walk.batches():
            add_gram(total, gradient.read(rows)[valid[rows]].to(dtype))
        self.moments[index] = total / int(valid.sum())


class LayerStudent(Trainee):
    """One layer of the student, trained on the boundaries of a walk over the original."""

    def __init__(
        self, layer: nn.Module, place: Place, walk: Walk, calls: Rehearsal, metric: Tensor | None, held_out: int
    ) -> None:
        """Train a layer that has its weights.

        Args:
            layer: of the student.
            place: where it stands.
            walk: over the original; it has kept its boundaries. Its first windows are trained on.
            calls: of the student.
            metric: second moment [D, D] of the gradient after the layer; None for squared errors.
            held_out: how many of the last windows are held out.
        """
        super().__init__()
        self.model, self.objective = layer, walk.tokens.objective
        self._place, self._walk, self._calls, self._metric = place, walk, calls, metric
        self._first_held_out = walk.tokens.sequences - held_out
        self._scale = 1.0 if metric is not None else self._mean_square()

    @property
    def name(self) -> str:
        """What the loss is called."""
        return "nats" if self._metric is not None else "squares"

    def train(self, mode: bool = True) -> LayerStudent:
        """Go on computing as in evaluation, as the original does."""
        super().train(False)
        return self

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        windows: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **more: Tensor,
    ) -> dict[str, Tensor]:
        """Return `{"loss": ...}` over the tokens with loss; see `Trainee`.

        Where not the next token is predicted, few have any, or none of its own: then it is over all that are no
        padding, and every window weighs as much as its items.
        """
        errors = torch.cat([self._errors(int(window)) for window in windows])[:, : input_ids.shape[1]]
        items, mask = self.items(labels), more.get("attention_mask")
        if mask is None:
            total = errors[labels != NO_LABEL].sum()
        else:
            total = ((errors * mask).sum(dim=1) / mask.sum(dim=1) * items).sum()
        self.sums.add(self.name, total)
        self.sums.tokens += int(items.sum())
        return {"loss": total / self.step_items(labels, num_items_in_batch)}

    @torch.no_grad()
    def measure(self, text: str, tokens: PackedTokens, batch_size: int) -> float:
        """Return the mean error on the held-out windows, of all tokens that are no padding."""
        total, count = 0.0, 0
        for row in range(tokens.sequences):
            errors = self._errors(self._first_held_out + row)[tokens.valid[row : row + 1]]
            total, count = total + float(errors.double().sum()), count + len(errors)
        return total / max(1, count)

    def _errors(self, window: int) -> Tensor:
        """Return the error of every token of a window [1, S]."""
        rows = slice(window, window + 1)
        call = self._calls.call(self._place.position, self._walk.tokens.inputs(rows))
        target = self._target(rows)
        after: Tensor = call(self.model, self._walk.boundary(self._place.before).read(rows))
        error = (after - target).to(torch.promote_types(target.dtype, torch.float32))
        if self._metric is None:
            return torch.sum(error.square(), dim=-1) / self._scale
        return torch.sum((error @ self._metric.to(error)) * error, dim=-1) / 2

    def _target(self, rows: slice) -> Tensor:
        return self._walk.boundary(self._place.after).read(rows)

    def _mean_square(self) -> float:
        """Return the mean square norm of what the layer is to give."""
        tokens = self._walk.tokens
        total = sum(
            float(self._target(rows)[tokens.valid[rows]].double().square().sum()) for rows in self._walk.batches()
        )
        return total / max(1, int(tokens.valid.sum()))
