"""One healing in numbers: what is trained, on how much, and how often. Memory, disk and seconds follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.config import HealingConfig
from layer_surgery.config.healing import Trained
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.adapters import adapter_targets
from layer_surgery.healing.losses.registry import Needs
from layer_surgery.healing.trainable import numbers_of, trained_names
from layer_surgery.records import SurgeryPlan
from layer_surgery.runs.foresight.sizes import Sizes
from layer_surgery.runs.healing.prepare import PreparedHealing


class Numbers(NamedTuple):
    """How many numbers are trained."""

    all: int
    outside: int  #: Of them those of embeddings and head.
    added: int  #: Of them those of adapters, which the student has beside its own.


@dataclass(frozen=True, kw_only=True)
class HealingCase:
    """Sizes of both models, and what the options come to."""

    prepared: PreparedHealing
    teacher: Sizes
    student: Sizes
    trained: Numbers
    positions: tuple[int, ...]  #: Layers that the local stage trains.
    paired: int  #: Boundaries of the original whose states a loss of states looks at.
    related: int  #: Numbers a token of the original's queries, keys and values that a loss of relations looks at.
    both_models: bool
    checkpointing: bool

    @property
    def config(self) -> HealingConfig:
        """The options."""
        return self.prepared.config

    @property
    def needs(self) -> set[Needs]:
        """What the losses look at."""
        return {loss.entry.needs for loss in self.prepared.losses}

    @property
    def student_parameters(self) -> int:
        """Numbers of the student, without adapters."""
        return self.student.outside + sum(layer.parameters for layer in self.student.layers)

    @property
    def teacher_parameters(self) -> int:
        """Numbers of the original."""
        return self.teacher.outside + sum(layer.parameters for layer in self.teacher.layers)

    @property
    def length(self) -> int:
        """Tokens of the longest window."""
        return self.prepared.data.train.sequence_length

    @property
    def micro_batch(self) -> int:
        """Windows that are trained on at a time, as `TrainingSettings` has it."""
        step = self.config.step_sequences
        if self.embeds:
            return step
        return max(size for size in range(1, self.student.batch_size + 1) if step % size == 0)

    @property
    def keeps_records(self) -> bool:
        """Whether the largest probabilities of the original are kept, and not all that it says."""
        asked = "logits" in self.needs and not self.both_models
        return asked and not self.one_answer and self.prepared.kept_temperature is not None

    @property
    def one_answer(self) -> bool:
        """Whether the original says little of a text, which is kept in memory."""
        return self.prepared.data.train.objective.labelled or self.embeds

    @property
    def embeds(self) -> bool:
        """Whether the models give one vector a text."""
        return self.prepared.data.train.objective.problem == "embedding"

    @property
    def slots(self) -> int:
        """Boundaries of the original whose states are kept."""
        if self.both_models:
            return 0
        dense = "logits" in self.needs and not self.one_answer and not self.keeps_records
        last = dense and not self.paired  # else it is the last of the pairs
        return (self.paired if "states" in self.needs else 0) + int(last)

    def with_sizes(self, **changes: object) -> HealingCase:
        """Return the same with other settings of both models."""
        return replace(self, teacher=self.teacher.with_(**changes), student=self.student.with_(**changes))


def trained_numbers(student: Checkpoint, plan: SurgeryPlan, train: Trained, rank: int) -> Numbers:
    """Return how many numbers are trained. Raises `UserError` if there is nothing of what is asked for."""
    names = trained_names(student, plan, train)
    layers, added = f"{student.architecture.layers}.", 0
    if train == "lora":
        targets = adapter_targets(student.skeleton, student.architecture.layers)
        adapters = [student.skeleton.get_submodule(name) for name in targets]
        added = rank * sum(each.in_features + each.out_features for each in adapters if isinstance(each, nn.Linear))
    outside = numbers_of(student, {name for name in names if not name.startswith(layers)})
    return Numbers(all=numbers_of(student, names) + added, outside=outside, added=added)


def tokens_of(texts: Iterable[PackedTokens]) -> int:
    """Return the tokens of some texts that are no padding."""
    return sum(int(text.valid.sum()) for text in texts)
