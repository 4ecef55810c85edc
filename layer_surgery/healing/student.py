"""The student as one module that takes windows and returns their loss: the body once, then head and losses in chunks.

So no matrix of tokens x vocabulary is ever made, and wrappers for several processes see one forward pass.
Of an embedding model the labels are the teacher's vectors, and those of the texts that come together are compared.
Shapes: B windows of S tokens, n items with loss (tokens, or windows where a head gives one answer a sequence), D
hidden, V vocabulary or outputs of a classifier, E numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError
from layer_surgery.healing.adapters import is_adapter, merged_weights, plain_name
from layer_surgery.healing.attention_maps import AttentionMaps
from layer_surgery.healing.body import Body
from layer_surgery.healing.head import chunked_head_loss
from layer_surgery.healing.inner import Values, of_attention, of_relations, of_states
from layer_surgery.healing.losses.inputs import Stones, VectorPair
from layer_surgery.healing.losses.states import Projections
from layer_surgery.healing.losses.vectors import VectorProjection
from layer_surgery.healing.mixture import WeightedLoss
from layer_surgery.healing.outputs import TeacherAnswers, item_values, token_outputs
from layer_surgery.healing.packing import Batch, Packing
from layer_surgery.healing.relations import Relations
from layer_surgery.healing.resident import ResidentTeacher
from layer_surgery.healing.sources import TeacherOutputs, TeacherStates
from layer_surgery.healing.stones import SteppingStones
from layer_surgery.healing.trainable import BEHIND
from layer_surgery.healing.trainee import Trainee, unfrozen
from layer_surgery.healing.validation import embeddings, mean_loss
from layer_surgery.walk.losses import targets
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import LOGITS_AT_A_TIME


class Student(Trainee):
    """A whole model in memory with the losses that it is trained on.

    `forward` is what transformers' Trainer calls: it returns the sum of the losses over the items of a micro-batch,
    divided by the items of the whole step of the optimiser.
    """

    model: Any  # a PreTrainedModel
    behind: nn.Module | None  #: The modules behind the transformer of an embedding model.

    def __init__(
        self,
        streamed: StreamedModel,
        losses: Sequence[WeightedLoss],
        outputs: TeacherOutputs | None = None,
        states: TeacherStates | None = None,
        pairs: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Load the model whole.

        Args:
            streamed: the student; it keeps no layers of its own (`resident_bytes=0`).
            losses: what is added up; those of states need `states` and `pairs`.
            outputs: of the teacher, for losses that look at its logits.
            states: of the teacher, by pair.
            pairs: (layer of the student, layer of the teacher), as from `layer_pairs`.
        """
        super().__init__()
        self.body = Body(streamed)
        self.model, self.behind = self.body.model, streamed.behind
        if self.behind is not None:
            self.behind.requires_grad_(False)
        self._losses, self._pairs = list(losses), list(pairs)
        self.outputs, self.states = outputs, states
        self.relations: Relations | None = None
        self.maps: AttentionMaps | None = None  #: Needs `resident`.
        self.stones: SteppingStones | None = None  #: Likewise.
        self.resident: ResidentTeacher | None = None
        self.packs = False  #: Whether short windows share rows; see `healing/packing.py`.
        self.checkpoint = streamed.checkpoint
        self.objective = streamed.checkpoint.objective
        self._chunk = max(1, LOGITS_AT_A_TIME // streamed.vocabulary_size)
        self.projections: Projections | None = None
        self.vector_projection: VectorProjection | None = None  #: See `fit_projection`.
        if any(loss.settings.get("projected") and loss.entry.needs == "states" for loss in losses):
            dtype = torch.promote_types(streamed.dtype, torch.float32)
            self.projections = Projections(streamed.hidden_size, range(len(pairs)), dtype, streamed.device)

    @property
    def layers(self) -> nn.ModuleList:
        return self.body.layers

    @property
    def projects_vectors(self) -> bool:
        """Whether its vectors go through a map of their own into the teachers' space for a loss."""
        return any(loss.settings.get("projected") and loss.entry.needs == "vectors" for loss in self._losses)

    def fit_projection(self, tokens: PackedTokens, batch_size: int) -> None:
        """Make that map, from texts whose labels are the teachers' vectors."""
        own, teacher = embeddings(self.body, tokens, batch_size), targets(tokens, slice(None))
        dtype = torch.promote_types(self.body.dtype, torch.float32)
        self.vector_projection = VectorProjection(own, teacher, dtype).to(self.body.device)

    @property
    def config(self) -> Any:
        """Configuration of the model, which Trainer looks at."""
        return self.model.config

    @torch.no_grad()
    def trained_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the model that training has changed, adapters merged, by the model's own names."""
        found = {
            plain_name(name): value.detach()
            for name, value in self.model.named_parameters()
            if value.requires_grad and not is_adapter(name)
        }
        return found | merged_weights(self.model)

    def unfreeze(self, names: Collection[str]) -> int:
        """Have the named parameters trained, also of the modules behind a transformer; return how many numbers."""
        own = {name.removeprefix(BEHIND) for name in names if name.startswith(BEHIND)}
        return super().unfreeze(names) + (unfrozen(self.behind, own) if self.behind is not None else 0)

    @torch.no_grad()
    def trained_behind(self) -> dict[str, Tensor]:
        """Return the tensors of the modules behind the transformer that training has changed, by their names there."""
        named = self.behind.named_parameters() if self.behind is not None else ()
        return {name: value.detach() for name, value in named if value.requires_grad}

    def train(self, mode: bool = True) -> Student:
        """Go on computing as in evaluation: the teacher was asked without dropout too.

        Only layers whose activations are computed twice have to know that they are trained.
        """
        super().train(False)
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Have activations computed twice instead of kept; called by Trainer."""
        self.model.activation_checkpointing_enable(**options)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        windows: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        lengths: Tensor | None = None,
        **more: Tensor,
    ) -> dict[str, Tensor]:
        """Return `{"loss": ...}` of windows [B, S] with labels as `targets` gives them.

        Args:
            windows: [B] int64, their numbers in the teacher's outputs.
            num_items_in_batch: labels in the whole step of the optimiser; None: those of `labels`.
            lengths: [B] tokens of each window that are no padding, where they may share rows.
            more: what else the model is called with, as `PackedTokens.inputs` has it.

        Raises `NumericalError`, which names the first layer with a state that is not finite.
        """
        given = {"input_ids": input_ids, **more}
        batch = Batch(given, labels, self._packing(lengths))
        last, items = self.body.last, self.items(labels)
        paired = {position for position, _ in self._pairs} if self.states is not None else set()
        with ExitStack() as stack:
            related = stack.enter_context(self.relations.seen(self.layers[last])) if self.relations is not None else {}
            attended = stack.enter_context(self.maps.of_student(self.layers)) if self.maps is not None else {}
            run = self.body.states(batch.run, paired.union(self.stones.positions if self.stones is not None else ()))
        if self.resident is not None:
            self.resident.look(batch)
        hidden = {position: batch.apart(run[position]) for position in {last, *paired}}
        teacher = self.outputs.read(windows) if self.outputs is not None else None
        total = torch.zeros((), device=input_ids.device)
        if self.objective.problem == "embedding":
            total = total + self._vectors_loss(hidden[last], labels, given)
        if self._output_losses:
            if self.objective.of_sequences:
                total = total + self._answers_loss(hidden[last], labels, teacher, given)
            else:
                carries = labels != NO_LABEL
                total = total + self._logits_loss(hidden[last][carries], labels[carries], teacher)
        if self.stones is not None and teacher is not None:
            total = total + self._stones_loss(
                self.stones, [*self.stones.states(run, batch), hidden[last]], labels, teacher
            )
        if self.states is not None:
            length = input_ids.shape[1]
            pairs = [(hidden[at], self.states.read(n, windows)[:, :length]) for n, (at, _) in enumerate(self._pairs)]
            total = total + self._sum(of_states(self._losses, pairs, batch, items, self.projections))
        if self.relations is not None:
            total = total + self._sum(of_relations(self._losses, self.relations, related, batch, windows, items))
        if self.resident is not None:
            if self.maps is not None:
                theirs = self.resident.attended
                total = total + self._sum(of_attention(self._losses, self.maps, attended, theirs, batch, items))
            self.resident.forget()
        if not torch.isfinite(total):
            raise self._not_finite(given)
        self.sums.tokens += int(items.sum())
        return {"loss": total / self.step_items(labels, num_items_in_batch)}

    def _packing(self, lengths: Tensor | None) -> Packing | None:
        """Return where windows of these lengths [B] stand, if some share a row."""
        if not self.packs or lengths is None:
            return None
        found = Packing.of(lengths.cpu())
        return found if found.saves else None

    def _sum(self, values: Values) -> Tensor:
        """Return the weighted sum [] of losses, and note each."""
        total = torch.zeros((), device=self.body.device)
        for loss, value in values:
            self.sums.add(loss.name, value)
            total = total + loss.weight * value
        return total

    def _not_finite(self, given: Mapping[str, Tensor]) -> NumericalError:
        return NumericalError(f"the loss is not finite ({self.body.where_not_finite(given)} of the student)")

    def measure(self, text: str, tokens: PackedTokens, batch_size: int) -> float:
        """Return the mean of the head's own loss, per token with loss or per sequence, of the student as it is."""
        return mean_loss(self.body, text, tokens, batch_size)

    @property
    def _output_losses(self) -> list[WeightedLoss]:
        return [loss for loss in self._losses if loss.entry.needs in ("labels", "logits")]

    def _head(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, V], float32 or better, that follow states [n, D] after the last layer."""
        return token_outputs(self.body.rehearsal, hidden)

    def _answers_loss(
        self, hidden: Tensor, labels: Tensor, teacher: TeacherAnswers | None, given: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the weighted sum over windows of the losses that look at outputs, for states [B, S, D]."""
        losses = self._output_losses
        outputs = self.body.rehearsal.head(hidden, given)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        known = None if teacher is None else teacher.rows(slice(None))
        values = item_values(losses, outputs, labels, known, self.objective)
        for loss, value in zip(losses, values.detach(), strict=True):
            self.sums.add(loss.name, value.sum())
        return torch.tensor([loss.weight for loss in losses]).to(values) @ values.sum(dim=1)

    def _vectors_loss(self, hidden: Tensor, teacher: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted losses of embeddings, each a mean over texts, times their number, for states [B, S, D].

        `teacher` is [B, E].
        """
        vectors = self.body.rehearsal.head(hidden, given)
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        lengths = vectors.detach().norm(dim=1)
        if not (torch.isfinite(lengths) & (lengths > 0)).all():  # one that is 0 has no direction
            raise self._not_finite(given)
        pair, total = VectorPair(vectors, teacher.to(vectors)), torch.zeros((), device=vectors.device)
        projected = pair
        if self.vector_projection is not None:
            projected = VectorPair(self.vector_projection(vectors), pair.teacher)
        for loss in self._losses:
            if loss.entry.needs == "vectors":
                value = loss.value(projected if loss.settings.get("projected") else pair) * len(vectors)
                self.sums.add(loss.name, value)
                total = total + loss.weight * value
        return total

    def _logits_loss(self, hidden: Tensor, labels: Tensor, teacher: TeacherAnswers | None) -> Tensor:
        """Return the weighted sum over tokens of the losses that look at logits, for states [n, D]."""
        losses = self._output_losses

        def of_chunk(logits: Tensor, chunk: slice) -> Tensor:
            known = teacher.rows(chunk) if teacher is not None else None
            return item_values(losses, logits, labels[chunk], known, self.objective)

        found = chunked_head_loss(
            hidden,
            self._head,
            of_chunk,
            weights=torch.tensor([loss.weight for loss in losses], device=hidden.device),
            token_weights=torch.ones(len(hidden), device=hidden.device),
            parameters=self._head_parameters(),
            tokens_at_a_time=self._chunk,
        )
        for loss, values in zip(losses, found.values, strict=True):
            self.sums.add(loss.name, values.sum())
        return found.total

    def _stones_loss(
        self, stones: SteppingStones, states: Sequence[Tensor], labels: Tensor, teacher: TeacherAnswers
    ) -> Tensor:
        """Return the weighted sum over tokens of the losses of stepping stones.

        Args:
            states: [B, L, D] after the last layer of each stone, those of the student itself at the end.
        """
        losses = [loss for loss in self._losses if loss.entry.needs == "stones"]
        carries, width = labels != NO_LABEL, states[-1].shape[-1]
        # Side by side, as one state of each token: the head sees as many tokens of all of them at a time.
        together = torch.cat([each[carries].to(states[-1].dtype) for each in states], dim=1)

        def outputs(hidden: Tensor) -> Tensor:  # [c, V, stones]
            *others, own = torch.split(hidden, width, dim=1)
            return torch.stack([*stones.outputs(others), self._head(own)], dim=-1)

        def of_chunk(logits: Tensor, chunk: slice) -> Tensor:
            compared = Stones(logits.unbind(dim=-1), teacher.rows(chunk))
            return torch.stack([loss.value(compared) for loss in losses])

        found = chunked_head_loss(
            together,
            outputs,
            of_chunk,
            weights=torch.tensor([loss.weight for loss in losses], device=together.device),
            token_weights=torch.ones(len(together), device=together.device),
            parameters=self._head_parameters(),
            tokens_at_a_time=max(1, self._chunk // len(states)),
        )
        for loss, values in zip(losses, found.values, strict=True):
            self.sums.add(loss.name, values.sum())
        return found.total

    def _head_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters that logits may depend on beside the layers: not embeddings of their own."""
        inside = {id(parameter) for parameter in self.layers.parameters()}
        into, out = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if out is None or into.weight is not out.weight:
            inside |= {id(parameter) for parameter in into.parameters()}
        return [each for each in self.model.parameters() if each.requires_grad and id(each) not in inside]
