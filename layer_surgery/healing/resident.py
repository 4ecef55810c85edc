"""The original in memory beside the student (`--both-models`): run on each micro-batch instead of asked once.

Its memory is that of its weights, and of what its last layers give for one micro-batch. What it says is read like what
is kept on disk, so that every loss works with either; `stones` and `attention` need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from layer_surgery.checkpoint.attention import QueriesKeysValues
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.healing.attention_maps import Attended, AttentionMaps
from layer_surgery.healing.body import Body
from layer_surgery.healing.outputs import HiddenAnswers, TeacherAnswers, teacher_outputs, token_outputs
from layer_surgery.healing.packing import Batch
from layer_surgery.walk.streamed import StreamedModel


class ResidentTeacher:
    """An original that is run beside the student, and what it has given for the micro-batch at hand."""

    def __init__(
        self,
        streamed: StreamedModel,
        layers: Sequence[int] = (),
        projections: QueriesKeysValues | None = None,
        maps: AttentionMaps | None = None,
    ) -> None:
        """Load the original whole.

        Args:
            streamed: the original; it keeps no layers of its own (`resident_bytes=0`).
            layers: after which states are looked at, pair by pair.
            projections: where its last layer has queries, keys and values, if they are looked at.
            maps: layers whose attention is looked at, if any is.
        """
        self.body = Body(streamed)
        self._layers, self._projections, self._maps = list(layers), projections, maps
        self._batch: Batch | None = None
        self._states: dict[int, Tensor] = {}
        self._projected: dict[str, Tensor] = {}
        self.attended: dict[int, Attended] = {}

    @torch.no_grad()
    def look(self, batch: Batch) -> None:
        """Run on a micro-batch; what is read afterwards is of it."""
        layers = self.body.layers
        with ExitStack() as stack:
            if self._projections is not None:
                self._projected = stack.enter_context(self._projections.seen(layers[self.body.last]))
            if self._maps is not None:
                self.attended = stack.enter_context(self._maps.of_teacher(layers))
            self._states = self.body.states(batch.run, self._layers)
        self._batch = batch

    def forget(self) -> None:
        """Let go of the micro-batch."""
        self._batch, self._states, self._projected, self.attended = None, {}, {}, {}

    def rest(self, hidden: Tensor, layer: int, batch: Batch) -> Tensor:
        """Return the states [B, L, D] by window after the last layer, of states [P, R, D] after `layer`."""
        return batch.apart(self.body.rest(hidden, layer + 1, batch.run))

    def outputs_of(self, hidden: Tensor) -> Tensor:
        """Return the outputs [n, V] of its head for states [n, D] after the last layer. Differentiable."""
        return token_outputs(self.body.rehearsal, hidden.to(self.body.dtype))

    @torch.no_grad()
    def answers(self) -> TeacherAnswers:
        """Return what it says of the items with loss."""
        assert self._batch is not None
        objective = self.body.checkpoint.objective
        hidden = self._batch.apart(self._states[self.body.last])
        if objective.of_sequences:
            outputs = self.body.rehearsal.head(hidden, self._batch.given)
            return teacher_outputs(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), objective)
        carries = self._batch.labels != NO_LABEL
        return HiddenAnswers(hidden[carries], self.outputs_of, objective)

    def states(self, pair: int) -> Tensor:
        """Return the states [B, L, D] after the layer of a pair."""
        assert self._batch is not None
        return self._batch.apart(self._states[self._layers[pair]])

    def projected(self) -> tuple[Tensor, ...]:
        """Return queries, keys and values of the last layer, each [B, L, its width]."""
        assert self._batch is not None and self._projections is not None
        shape = next(iter(self._states.values())).shape[:2]
        joined = self._projections.joined(self._projected, shape)
        return self._projections.split(self._batch.apart(joined))


class ResidentOutputs:
    """What an original that is run beside the student says; read of the micro-batch at hand only."""

    def __init__(self, teacher: ResidentTeacher) -> None:
        self._teacher = teacher

    def read(self, _windows: Tensor) -> TeacherAnswers:
        return self._teacher.answers()


class ResidentStates:
    """Its states, likewise."""

    def __init__(self, teacher: ResidentTeacher) -> None:
        self._teacher = teacher

    def read(self, pair: int, _windows: Tensor) -> Tensor:
        return self._teacher.states(pair)


class ResidentProjections:
    """Its queries, keys and values, likewise."""

    def __init__(self, teacher: ResidentTeacher) -> None:
        self._teacher = teacher

    def read(self, _windows: Tensor) -> tuple[Tensor, ...]:
        return self._teacher.projected()
