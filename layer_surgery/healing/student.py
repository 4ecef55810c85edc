"""The student as one module that takes windows and returns their loss: the body once, then head and losses in chunks.

So no matrix of tokens x vocabulary is ever made, and wrappers for several processes see one forward pass.
Shapes: B windows of S tokens, n of them with loss, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError
from layer_surgery.healing.adapters import is_adapter, merged_weights, plain_name
from layer_surgery.healing.head import chunked_head_loss
from layer_surgery.healing.losses.inputs import StatePair, TeacherLogits, TokenLogits
from layer_surgery.healing.mixture import WeightedLoss, token_values
from layer_surgery.healing.trainee import Trainee
from layer_surgery.walk.losses import next_tokens
from layer_surgery.walk.rehearsal import Rehearsal
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import LOGITS_AT_A_TIME


class TeacherOutputs(Protocol):
    """What the teacher says of the windows that are trained on."""

    def read(self, windows: Tensor) -> TeacherLogits:
        """Return what it says of the tokens with loss of some windows [B] int64, in their order."""
        ...


class TeacherStates(Protocol):
    """Hidden states of the teacher in the windows that are trained on."""

    def read(self, pair: int, windows: Tensor) -> Tensor:
        """Return the states [B, S, D] after the teacher's layer of a pair."""
        ...


class Student(Trainee):
    """A whole model in memory with the losses that it is trained on.

    `forward` is what transformers' Trainer calls: it returns the sum of the losses over the tokens of a micro-batch,
    divided by the tokens of the whole step of the optimiser.
    """

    model: Any  # a PreTrainedModel

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
        self._streamed, self._losses, self._pairs = streamed, list(losses), list(pairs)
        self.outputs, self.states = outputs, states
        self._rehearsal = Rehearsal(streamed)
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
    ) -> dict[str, Tensor]:
        """Return `{"loss": ...}` of windows [B, S] with labels [B, S] int64 (`NO_LABEL` where there is no loss).

        Args:
            windows: [B] int64, their numbers in the teacher's outputs.
            num_items_in_batch: tokens with loss in the whole step of the optimiser; None: those of `labels`.

        Raises `NumericalError`, which names the first layer with a state that is not finite.
        """
        carries = labels != NO_LABEL
        hidden = self._hidden(input_ids)
        chosen = labels[carries]
        teacher = self.outputs.read(windows) if self.outputs is not None else None
        total = torch.zeros((), device=input_ids.device)
        if any(loss.entry.needs in ("labels", "logits") for loss in self._losses):
            total = total + self._logits_loss(hidden[self._last][carries], chosen, teacher)
        if self.states is not None:
            total = total + self._states_loss(hidden, carries, windows, self.states)
        if not torch.isfinite(total):
            raise NumericalError(self._not_finite(input_ids))
        self.sums.tokens += len(chosen)
        return {"loss": total / (num_items_in_batch if num_items_in_batch is not None else max(1, len(chosen)))}

    @torch.no_grad()
    def measure(self, text: str, tokens: PackedTokens, batch_size: int) -> float:
        """Return the mean cross-entropy of the next tokens, nats per token with loss, of the student as it is."""
        total, count = 0.0, 0
        for rows in tokens.batches(batch_size):
            ids, labels = tokens.token_ids[rows].to(self._streamed.device), next_tokens(tokens, rows)
            carries = labels != NO_LABEL
            hidden = self._hidden(ids)[self._last][carries]
            for start in range(0, len(hidden), self._chunk):
                logits = self._head(hidden[start : start + self._chunk])
                chosen = labels[carries][start : start + self._chunk].to(logits.device)
                total += float(nn.functional.cross_entropy(logits, chosen, reduction="sum").double())
            count += int(carries.sum())
        return total / max(1, count)

    def _hidden(self, input_ids: Tensor) -> dict[int, Tensor]:
        """Run the body and return the states [B, S, D] after the last layer and those of the pairs, by layer."""
        wanted = {self._last} | ({position for position, _ in self._pairs} if self.states is not None else set())
        with _outputs_of(self.layers, wanted) as seen:
            self.model.base_model(input_ids=input_ids, use_cache=False)
        return seen

    def _head(self, hidden: Tensor) -> Tensor:
        """Return the logits [n, V], float32 or better, that follow states [n, D] after the last layer."""
        logits = self._rehearsal.head(hidden[None])[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _logits_loss(self, hidden: Tensor, labels: Tensor, teacher: TeacherLogits | None) -> Tensor:
        """Return the weighted sum over tokens of the losses that look at logits, for states [n, D]."""
        losses = [loss for loss in self._losses if loss.entry.needs in ("labels", "logits")]

        def of_chunk(logits: Tensor, chunk: slice) -> Tensor:
            known = _rows(teacher, chunk) if teacher is not None else None
            return token_values(losses, TokenLogits(student=logits, teacher=known, labels=labels[chunk]))

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
        self, hidden: Mapping[int, Tensor], carries: Tensor, windows: Tensor, states: TeacherStates
    ) -> Tensor:
        """Return the weighted losses of states, each a mean over tokens, times the number of tokens."""
        pairs = []
        for number, (position, _) in enumerate(self._pairs):
            student = hidden[position][carries]
            teacher = states.read(number, windows)[:, : carries.shape[1]]
            pairs.append(StatePair(student, teacher[carries].to(student), number))
        total = torch.zeros((), device=carries.device)
        for loss in self._losses:
            if loss.entry.needs == "states":
                value = loss.value(pairs) * int(carries.sum())
                self.sums.add(loss.name, value)
                total = total + loss.weight * value
        return total

    @torch.no_grad()
    def _not_finite(self, input_ids: Tensor) -> str:
        """Return a sentence that names the first layer whose states are not finite."""
        with _outputs_of(self.layers, range(len(self.layers))) as seen:
            self.model.base_model(input_ids=input_ids, use_cache=False)
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
