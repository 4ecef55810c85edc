"""A short probe of what healing does on this machine: parts of a step of training, and of asking the original.

Some layers of the result pass a few windows forward and back with the gradients that `--train` wants, the losses are
computed from the head on by the functions that training calls, and the optimiser takes a step on some numbers. Neither
model is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.devices import now
from layer_surgery.healing.head import chunked_head_loss
from layer_surgery.healing.mixture import WeightedLoss
from layer_surgery.healing.outputs import HiddenAnswers, TeacherAnswers, item_values, token_outputs
from layer_surgery.healing.teacher.cache import TeacherCache, TeacherIdentity
from layer_surgery.healing.teacher.codebook import Codebook
from layer_surgery.healing.teacher.form import Observed, RecordForm, observe
from layer_surgery.healing.trainee import unfrozen
from layer_surgery.runs.foresight.probe import Rates, probe, seconds_of, some_of
from layer_surgery.runs.foresight.sizes import Sizes
from layer_surgery.walk.losses import targets
from layer_surgery.walk.rehearsal import Rehearsal
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import LOGITS_AT_A_TIME, WalkSettings

#: Numbers on which the optimiser is tried: more than fit into a cache.
_NUMBERS = 1 << 22


@dataclass
class TrainingRates:
    """Seconds and bytes a token of both models; `student.backward` is with the gradients of what is trained."""

    teacher: Rates
    student: Rates
    activations: dict[int, float]  #: Bytes that a layer of the student keeps for its gradients, by layer.
    head: float = 0.0  #: Seconds of the losses from the head on, forward and back.
    asked: float = 0.0  #: Seconds of the original's head, and of keeping what it says.
    fitted: float = 0.0  #: Seconds of what is fitted to the first tokens that are kept.
    kept_bytes: float = 0.0  #: Bytes a token that are kept of the original's probabilities.
    optimiser: float = 0.0  #: Seconds a trained number of a step of the optimiser.
    written: float = 0.0  #: Seconds a trained number to write it.


@dataclass(frozen=True, kw_only=True)
class TrainingProbe:
    """What is to be probed."""

    teacher: StreamedModel
    student: StreamedModel
    tokens: PackedTokens
    losses: Sequence[WeightedLoss]
    names: Collection[str]  #: Parameters that are trained.
    temperature: float | None  #: At which the largest probabilities are kept; None: all that the original says is.
    settings: WalkSettings
    scratch: Path

    def measure(self, teacher: Sizes, student: Sizes) -> TrainingRates:
        """Measure a layer of each kind of the original, and the smallest and the largest of each of the student."""
        tokens = self._with_vectors(some_of(self.tokens, teacher, self.settings, self.teacher.device))
        rates = TrainingRates(
            teacher=probe(self.teacher, tokens, teacher, self.settings, decompositions=False),
            student=Rates(),
            activations={},
        )
        self._layers(tokens, student, rates)
        self._head(tokens, rates)
        self._optimiser(rates)
        return rates

    def _with_vectors(self, tokens: PackedTokens) -> PackedTokens:
        """Return texts of an embedding model with any vectors in the place of the original's, which are not known."""
        embedder = self.teacher.checkpoint.embedder
        if embedder is None:
            return tokens
        size = embedder.dimensions(self.teacher.hidden_size)
        generator = torch.Generator().manual_seed(0)
        return replace(tokens, labels=torch.randn(tokens.sequences, size, generator=generator))

    # -- layers --------------------------------------------------------------------------------------------------------

    def _layers(self, tokens: PackedTokens, sizes: Sizes, rates: TrainingRates) -> None:
        """Measure the smallest and the largest layer of each kind; others lie between them, by their parameters."""
        kinds = dict[object, list[int]]()
        for index, layer in enumerate(sizes.layers):
            kinds.setdefault((layer.experts is not None, self._trains_matrices(index)), []).append(index)
        found = rates.student.forward, rates.student.backward, rates.student.reading, rates.activations
        for same in kinds.values():
            by_size = sorted(same, key=lambda index: sizes.layers[index].parameters)
            ends = by_size[0], by_size[-1]
            for index in sorted(set(ends)):
                self._layer(tokens, index, rates)
            low, high = (sizes.layers[index].parameters for index in ends)
            for index in same:
                share = (sizes.layers[index].parameters - low) / (high - low) if high > low else 0.0
                for values in found:
                    values.setdefault(index, (1 - share) * values[ends[0]] + share * values[ends[1]])

    def _layer(self, tokens: PackedTokens, index: int, rates: TrainingRates) -> None:
        device, rows, count = self.student.device, slice(0, tokens.sequences), int(tokens.valid.sum())
        rehearsal, start = Rehearsal(self.student), now(device)
        with self.student.layer(index) as layer:
            rates.student.reading[index] = now(device) - start
            hidden = rehearsal.embed(tokens.inputs(rows))
            call = rehearsal.call(index, tokens.inputs(rows))
            with torch.no_grad():
                rates.student.forward[index] = seconds_of(lambda: call(layer, hidden), device) / count
            unfrozen(layer, self._own(index))
            given = any(True for _ in self._trained_in_layers())  # then gradients go through all of them

            def forward() -> Tensor:
                with torch.enable_grad(), self._autocast():
                    return call(layer, hidden.detach().requires_grad_(given))

            def back() -> None:
                after = forward()
                if after.requires_grad:
                    after.backward(hidden.to(after.dtype))  # type: ignore[no-untyped-call]

            rates.student.backward[index] = seconds_of(back, device) / count
            rates.activations[index] = kept_for_gradients(layer, forward) / count

    def _own(self, index: int) -> set[str]:
        prefix = self.student.checkpoint.layer_prefix(index)
        return {name.removeprefix(prefix) for name in self.names if name.startswith(prefix)}

    def _trained_in_layers(self) -> Iterator[str]:
        layers = f"{self.student.architecture.layers}."
        return (name for name in self.names if name.startswith(layers))

    def _trains_matrices(self, index: int) -> bool:
        own, layer = self._own(index), self.student.layers[index]
        return any(value.dim() > 1 for name, value in layer.named_parameters() if name in own)

    def _autocast(self) -> AbstractContextManager[None]:
        if self.student.dtype.itemsize > 2:
            return nullcontext()
        return torch.autocast(self.student.device.type, self.student.dtype)

    # -- the head, and what the original says --------------------------------------------------------------------------

    def _head(self, tokens: PackedTokens, rates: TrainingRates) -> None:
        rates.student.head = rates.teacher.head
        rates.head, rates.asked = rates.teacher.head_backward, rates.teacher.head
        losses = [loss for loss in self.losses if loss.entry.needs in ("labels", "logits")]
        if tokens.objective.of_sequences or not losses:
            return
        device, rows = self.student.device, slice(0, tokens.sequences)
        rehearsal, original = Rehearsal(self.student), Rehearsal(self.teacher)
        labels = targets(tokens, rows).to(device)
        carries = labels != NO_LABEL
        hidden, theirs = (each.embed(tokens.inputs(rows))[carries] for each in (rehearsal, original))
        answers = self._answers(theirs, original, tokens, rates)
        layers = f"{self.student.architecture.layers}."
        model = self.student.model
        unfrozen(model, {name for name in self.names if not name.startswith(layers)})

        def work() -> None:
            teacher = answers()

            def of_chunk(logits: Tensor, chunk: slice) -> Tensor:
                known = teacher.rows(chunk) if teacher is not None else None
                return item_values(losses, logits, labels[carries][chunk], known, tokens.objective)

            with torch.enable_grad(), self._autocast():
                found = chunked_head_loss(
                    hidden.detach().requires_grad_(),
                    partial(token_outputs, rehearsal),
                    of_chunk,
                    weights=torch.tensor([loss.weight for loss in losses], device=device),
                    token_weights=torch.ones(len(hidden), device=device),
                    parameters=[each for each in model.parameters() if each.requires_grad],
                    tokens_at_a_time=max(1, LOGITS_AT_A_TIME // self.student.vocabulary_size),
                )
            found.total.backward()  # type: ignore[no-untyped-call]

        rates.head = seconds_of(work, device) / max(1, len(hidden))

    def _answers(
        self, hidden: Tensor, original: Rehearsal, tokens: PackedTokens, rates: TrainingRates
    ) -> Callable[[], TeacherAnswers | None]:
        """Return what reads what the original says as training does, and measure what keeping it takes."""
        if not any(loss.entry.needs == "logits" for loss in self.losses):
            return lambda: None
        if self.temperature is None:
            return lambda: HiddenAnswers(hidden, partial(token_outputs, original), tokens.objective)
        return self._kept(hidden, original, tokens, rates)

    def _kept(
        self, hidden: Tensor, original: Rehearsal, tokens: PackedTokens, rates: TrainingRates
    ) -> Callable[[], TeacherAnswers]:
        """Return what reads the records of the tokens with loss, from a cache as training has it."""
        assert self.temperature is not None
        form, device = RecordForm(temperature=self.temperature), self.teacher.device
        step = max(1, LOGITS_AT_A_TIME // self.teacher.vocabulary_size)
        seen = list[Observed]()

        @torch.no_grad()
        def look() -> None:
            seen[:] = [observe(token_outputs(original, piece), form, 0) for piece in torch.split(hidden, step)]

        counts, vocabulary = tokens.loss_mask.sum(dim=1).tolist(), self.teacher.vocabulary_size
        none = TeacherIdentity(teacher_sha256="", tokenizer_sha256="", data_sha256="")
        cache = TeacherCache.open(self.scratch / "probe", none, tokens=counts, vocabulary=vocabulary, form=form)
        looked = seconds_of(look, device, times=1)
        written = seconds_of(lambda: cache.write(seen), device, times=1)
        fitted = seconds_of(lambda: Codebook.fitted(Observed.joined(seen), form, vocabulary), device, times=1)
        count = max(1, len(hidden))
        rates.asked, rates.fitted = (looked + max(0.0, written - fitted)) / count, fitted / count
        rates.kept_bytes = cache.nbytes / count
        records = cache.records()
        return lambda: records.read(range(tokens.sequences))

    # -- the optimiser -------------------------------------------------------------------------------------------------

    def _optimiser(self, rates: TrainingRates) -> None:
        device = self.student.device
        weight = nn.Parameter(torch.zeros(_NUMBERS, device=device))
        weight.grad = torch.ones_like(weight)
        optimiser = torch.optim.AdamW([weight], lr=0.0, fused=True)

        def step() -> None:
            nn.utils.clip_grad_norm_([weight], 1.0)
            optimiser.step()

        rates.optimiser = seconds_of(step, device) / _NUMBERS
        values, file = weight.detach().cpu(), self.scratch / "probe.safetensors"
        rates.written = seconds_of(lambda: save_file({"weight": values}, file), device, times=1) / _NUMBERS
        file.unlink()


def kept_for_gradients(layer: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Return the bytes that a layer's forward pass keeps for the way back, beside its weights."""
    weights = {each.untyped_storage().data_ptr() for each in layer.parameters()}
    shapes = {shape for each in layer.parameters() for shape in (each.shape, each.shape[::-1])}
    kept = dict[int, int]()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes:  # nor weights in 16 bits
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        after = forward()
    return sum(kept.values()) if after.requires_grad else 0
