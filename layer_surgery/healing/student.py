"""The student as one module that takes windows and returns their loss: the body once, then head and losses in chunks.

So no matrix of tokens x vocabulary is ever made, and wrappers for several processes see one forward pass.
Of an embedding model the labels are the teacher's vectors, and those of the texts that come together are compared.
Shapes: B windows of S tokens, n items with loss (tokens, or windows where a head gives one answer a sequence), D
hidden, V vocabulary or outputs of a classifier, E numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError
from layer_surgery.healing.adapters import is_adapter, merged_weights, plain_name
from layer_surgery.healing.head import chunked_head_loss
from layer_surgery.healing.losses.inputs import StatePair, TeacherLogits, VectorPair
from layer_surgery.healing.mixture import WeightedLoss
from layer_surgery.healing.outputs import item_values, token_outputs
from layer_surgery.healing.relations import Relations
from layer_surgery.healing.trainable import BEHIND
from layer_surgery.healing.trainee import Trainee, unfrozen
from layer_surgery.walk.embedding import embedding_losses
from layer_surgery.walk.losses import losses as own_losses
from layer_surgery.walk.losses import targets
from layer_surgery.walk.rehearsal import Rehearsal
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import LOGITS_AT_A_TIME


class TeacherOutputs(Protocol):
    """What the teacher says of the windows that are trained on."""

    def read(self, windows: Tensor) -> TeacherLogits:
        """Return what it says of the items with loss of some windows [B] int64, in their order."""
        ...


class TeacherStates(Protocol):
    """Hidden states of the teacher in the windows that are trained on."""

    def read(self, pair: int, windows: Tensor) -> Tensor:
        """Return the states [B, S, D] after the teacher's layer of a pair."""
        ...


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
        self.model = streamed.load_whole()
        self.behind = streamed.behind
        if self.behind is not None:
            self.behind.requires_grad_(False)
        self._streamed, self._losses, self._pairs = streamed, list(losses), list(pairs)
        self.outputs, self.states = outputs, states
        self.relations: Relations | None = None
        self.checkpoint = streamed.checkpoint
        self._rehearsal = Rehearsal(streamed)
        self.objective = streamed.checkpoint.objective
        self._chunk = max(1, LOGITS_AT_A_TIME // streamed.vocabulary_size)

    @property
    def _last(self) -> int:
        return len(self.layers) - 1

    @property
    def layers(self) -> nn.ModuleList:
        return self._streamed.layers

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
        **more: Tensor,
    ) -> dict[str, Tensor]:
        """Return `{"loss": ...}` of windows [B, S] with labels as `targets` gives them.

        Args:
            windows: [B] int64, their numbers in the teacher's outputs.
            num_items_in_batch: labels in the whole step of the optimiser; None: those of `labels`.
            more: what else the model is called with, as `PackedTokens.inputs` has it.

        Raises `NumericalError`, which names the first layer with a state that is not finite.
        """
        given = {"input_ids": input_ids, **more}
        with nullcontext({}) if self.relations is None else self.relations.seen(self.layers[self._last]) as projected:
            hidden = self._hidden(given)
        teacher = self.outputs.read(windows) if self.outputs is not None else None
        total = torch.zeros((), device=input_ids.device)
        if self.objective.problem == "embedding":
            total = total + self._vectors_loss(hidden[self._last], labels, given)
        if self._output_losses:
            if self.objective.of_sequences:
                total = total + self._answers_loss(hidden[self._last], labels, teacher, given)
            else:
                carries = labels != NO_LABEL
                total = total + self._logits_loss(hidden[self._last][carries], labels[carries], teacher)
        if self.states is not None:
            total = total + self._states_loss(hidden, labels, windows, more.get("attention_mask"))
        if self.relations is not None:
            total = total + self._relations_loss(self.relations, projected, labels, windows, more.get("attention_mask"))
        if not torch.isfinite(total):
            raise NumericalError(self._not_finite(given))
        self.sums.tokens += int(self.items(labels).sum())
        return {"loss": total / self.step_items(labels, num_items_in_batch)}

    @torch.no_grad()
    def measure(self, text: str, tokens: PackedTokens, batch_size: int) -> float:
        """Return the mean of the head's own loss, per token with loss or per sequence, of the student as it is."""
        objective, group = tokens.objective, parallel.group()
        if objective.problem == "embedding":
            return self._measured_vectors(tokens, batch_size)
        batches = [*tokens.batches(batch_size)]
        sums = dict[int, tuple[float, int]]()  # of each micro-batch of this process's
        for number in range(group.rank, len(batches), group.world):
            rows, total = batches[number], 0.0
            given, labels = tokens.inputs(rows), targets(tokens, rows).to(self._streamed.device)
            last = self._hidden(given)[self._last]
            if objective.of_sequences:
                found = own_losses(self._rehearsal.head(last, given), labels, objective)
                sums[number] = float(found.double().sum()), len(found)
                continue
            carries = labels != NO_LABEL
            hidden, chosen = last[carries], labels[carries]
            for start in range(0, len(hidden), self._chunk):
                logits = self._head(hidden[start : start + self._chunk])
                part = chosen[start : start + self._chunk]
                total += float(nn.functional.cross_entropy(logits, part, reduction="sum").double())
            sums[number] = total, len(chosen)
        every: list[Any] = sorted(each for of_one in parallel.gather([*sums.items()]) for each in of_one)
        whole, count = float(sum(part[0] for _, part in every)), int(sum(part[1] for _, part in every))
        return whole / max(1, count)

    def _measured_vectors(self, tokens: PackedTokens, batch_size: int) -> float:
        """Return the mean loss of embeddings, all texts compared with each other; one process has them all."""
        found = []
        for rows in tokens.batches(batch_size):
            given = tokens.inputs(rows)
            found.append(self._rehearsal.head(self._hidden(given)[self._last], given).double().cpu())
        return float(embedding_losses(torch.cat(found), targets(tokens, slice(None))).mean())

    @property
    def _output_losses(self) -> list[WeightedLoss]:
        return [loss for loss in self._losses if loss.entry.needs in ("labels", "logits")]

    def _hidden(self, given: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Run the body and return the states [B, S, D] after the last layer and those of the pairs, by layer."""
        wanted = {self._last} | ({position for position, _ in self._pairs} if self.states is not None else set())
        with _outputs_of(self.layers, wanted) as seen:
            self.model.base_model(**self._rehearsal.arguments(given))
        return seen

    def _head(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, V], float32 or better, that follow states [n, D] after the last layer."""
        return token_outputs(self._rehearsal, hidden)

    def _answers_loss(
        self, hidden: Tensor, labels: Tensor, teacher: TeacherLogits | None, given: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the weighted sum over windows of the losses that look at outputs, for states [B, S, D]."""
        losses = self._output_losses
        outputs = self._rehearsal.head(hidden, given)
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        values = item_values(losses, outputs, labels, teacher, self.objective)
        for loss, value in zip(losses, values.detach(), strict=True):
            self.sums.add(loss.name, value.sum())
        return torch.tensor([loss.weight for loss in losses]).to(values) @ values.sum(dim=1)

    def _vectors_loss(self, hidden: Tensor, teacher: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted losses of embeddings, each a mean over texts, times their number, for states [B, S, D].

        `teacher` is [B, E].
        """
        vectors = self._rehearsal.head(hidden, given)
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        lengths = vectors.detach().norm(dim=1)
        if not (torch.isfinite(lengths) & (lengths > 0)).all():  # one that is 0 has no direction
            raise NumericalError(self._not_finite(given))
        pair, total = VectorPair(vectors, teacher.to(vectors)), torch.zeros((), device=vectors.device)
        for loss in self._losses:
            if loss.entry.needs == "vectors":
                value = loss.value(pair) * len(vectors)
                self.sums.add(loss.name, value)
                total = total + loss.weight * value
        return total

    def _logits_loss(self, hidden: Tensor, labels: Tensor, teacher: TeacherLogits | None) -> Tensor:
        """Return the weighted sum over tokens of the losses that look at logits, for states [n, D]."""
        losses = self._output_losses

        def of_chunk(logits: Tensor, chunk: slice) -> Tensor:
            known = _rows(teacher, chunk) if teacher is not None else None
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

    def _head_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters that logits may depend on beside the layers: not embeddings of their own."""
        inside = {id(parameter) for parameter in self.layers.parameters()}
        into, out = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if out is None or into.weight is not out.weight:
            inside |= {id(parameter) for parameter in into.parameters()}
        return [each for each in self.model.parameters() if each.requires_grad and id(each) not in inside]

    def _states_loss(
        self, hidden: Mapping[int, Tensor], labels: Tensor, windows: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the weighted losses of states, each a mean over tokens, times the number of items.

        Where the next token is predicted, they are over the tokens with loss. Elsewhere few have any (masked tokens),
        or none of its own, so they are over all tokens of a window that are no padding, window by window: then they do
        not depend on which windows come together.
        """
        assert self.states is not None
        if mask is None:
            carries, counts = labels != NO_LABEL, [int((labels != NO_LABEL).sum())]
            parts = [(slice(None), carries)]
        else:
            counts = [int(count) for count in self.items(labels)]
            parts = [(slice(row, row + 1), mask[row : row + 1].bool()) for row in range(len(mask))]
        read = [
            (hidden[position], self.states.read(number, windows)[:, : hidden[position].shape[1]])
            for number, (position, _) in enumerate(self._pairs)
        ]
        total = torch.zeros((), device=labels.device)
        for count, (rows, seen) in zip(counts, parts, strict=True):
            pairs = [
                StatePair(student[rows][seen], teacher[rows][seen.to(teacher.device)].to(student), number)
                for number, (student, teacher) in enumerate(read)
            ]
            for loss in self._losses:
                if loss.entry.needs == "states" and count:
                    value = loss.value(pairs) * count
                    self.sums.add(loss.name, value)
                    total = total + loss.weight * value
        return total

    def _relations_loss(
        self, relations: Relations, seen: dict[str, Tensor], labels: Tensor, windows: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return the weighted losses of relations, each a mean over tokens of a window, times its number of items.

        As with states, these are the tokens with loss where the next token is predicted, and elsewhere all but padding.
        """
        carries = labels != NO_LABEL if mask is None else mask.bool()
        total = torch.zeros((), device=labels.device)
        for loss in self._losses:
            if loss.entry.needs == "relations":
                value = (relations.values(loss, seen, windows, carries, mask) * self.items(labels)).sum()
                self.sums.add(loss.name, value)
                total = total + loss.weight * value
        return total

    @torch.no_grad()
    def _not_finite(self, given: Mapping[str, Tensor]) -> str:
        """Return a sentence that names the first layer whose states are not finite."""
        with _outputs_of(self.layers, range(len(self.layers))) as seen:
            self.model.base_model(**self._rehearsal.arguments(given))
        bad = [position for position in sorted(seen) if not torch.isfinite(seen[position]).all()]
        where = f"the first states that are not finite come out of layer {bad[0]}" if bad else "all states are finite"
        return f"the loss is not finite ({where} of the student)"


def _rows(teacher: TeacherLogits, rows: slice) -> TeacherLogits:
    return TeacherLogits(
        log_probs=teacher.log_probs[rows],
        ids=None if teacher.ids is None else teacher.ids[rows],
        tail=None if teacher.tail is None else teacher.tail[rows],
        temperature=teacher.temperature,
    )


@contextmanager
def _outputs_of(layers: nn.ModuleList, positions: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, the states that come out of some layers are put into what is yielded, by position."""
    seen: dict[int, Tensor] = {}

    def take(position: int, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        seen[position] = output[0] if isinstance(output, tuple) else output

    hooks = [layers[position].register_forward_hook(partial(take, position)) for position in positions]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
