"""The stages of a healing with what each takes, and what would make it fit; of a saved result or of one to come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.config.healing import TRAINED
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import UserError
from layer_surgery.healing.relations import last_attention
from layer_surgery.healing.trainable import changed_positions, trained_names
from layer_surgery.records import SurgeryPlan
from layer_surgery.records.foresight import StageForesight
from layer_surgery.runs.foresight import healing_memory, memory
from layer_surgery.runs.foresight.healing_case import HealingCase, trained_numbers
from layer_surgery.runs.foresight.healing_seconds import HealingSeconds
from layer_surgery.runs.foresight.process import Process
from layer_surgery.runs.foresight.sizes import Sizes
from layer_surgery.runs.foresight.training_probe import TrainingProbe, TrainingRates
from layer_surgery.runs.healing.beside import ONLY_BESIDE
from layer_surgery.runs.healing.length import validations_of
from layer_surgery.runs.healing.prepare import PreparedHealing
from layer_surgery.runs.session import Session


@dataclass(frozen=True)
class ForeseenHealing:
    """A healing with what the probe has measured for it."""

    case: HealingCase
    rates: TrainingRates
    student: Checkpoint
    plan: SurgeryPlan
    known: Callable[[PackedTokens], int]  #: Windows from the first on that `--teacher-cache` has already.

    @classmethod
    def measure(
        cls,
        prepared: PreparedHealing,
        session: Session,
        teacher: Session,
        plan: SurgeryPlan,
        sizes: tuple[Sizes, Sizes],
        *,
        known: Callable[[PackedTokens], int],
        before_surgery: bool = False,
    ) -> Self:
        """Probe this machine.

        Args:
            session: of the student.
            teacher: of the original.
            sizes: of the original and of the student.
            known: how many windows, from the first on, need not be asked about.
            before_surgery: the student is not there yet, and the original stands for it.
        """
        config, student, original = prepared.config, session.checkpoint, teacher.checkpoint
        train = "operated" if before_surgery and config.train == "factors" else config.train
        related = any(loss.entry.needs == "relations" for loss in prepared.losses)
        case = HealingCase(
            prepared=prepared,
            teacher=sizes[0],
            student=sizes[1],
            trained=trained_numbers(student, plan, train, config.lora_rank),
            positions=tuple(changed_positions(plan)) if "local" in config.stages else (),
            paired=len(plan.surviving),
            related=sum(last_attention(original).widths) if related else 0,
            both_models=config.both_models,
            checkpointing=config.gradient_checkpointing,
        )
        session.ui.note("probing this machine: some layers forward and back, the losses, the optimiser")
        found = TrainingProbe(
            teacher=teacher.stream(original),
            student=session.stream(student),
            tokens=prepared.data.train,
            losses=prepared.losses,
            names=trained_names(student, plan, train),
            temperature=prepared.kept_temperature if case.keeps_records else None,
            settings=session.settings,
            scratch=session.scratch,
        ).measure(*sizes)
        return cls(case, found, student, plan, known)

    def stages(self, case: HealingCase, process: Process) -> list[StageForesight]:
        """Return the parts of a healing in their order, under the names that `timings` has them by."""
        config, times, found = case.config, HealingSeconds(case, self.rates, self.known), list[StageForesight]()

        def add(name: str, title: str, taken: float | None, working: memory.Parts) -> None:
            found.append(process.stage(name, title, taken, working, case.student))

        if config.teacher_rewrite:
            add("heal_rewrite", "answering prompts", None, healing_memory.answering(case))
        if "local" in config.stages:
            working = healing_memory.local(case, self.rates.activations)
            add("heal_local", f"training {len(case.positions)} layers, each by itself", times.local(), working)
        if "global" in config.stages:
            before, probed = sum(stage.seconds or 0.0 for stage in found), times.probe()
            steps = times.steps(before + probed)
            train = case.prepared.data.first(steps * config.step_sequences).train
            training = healing_memory.training(case, self.rates.activations, windows=train.sequences)
            if probed:
                title = "trying learning rates" if config.learning_rate is None else "measuring the time of a step"
                add("heal_probe", title, probed, training)
            if asking := times.asking(train):
                add(
                    "heal_ask",
                    f"asking the original about {train.sequences:,} windows",
                    asking,
                    healing_memory.asking(case),
                )
            tokens = round(steps * times.step_tokens)
            title = f"training ({config.train}), {steps:,} steps with {tokens:,} tokens"
            add("heal_train", title, times.training(steps), training)
        return found

    def files(self) -> dict[str, int]:
        """Return the bytes of what is written meanwhile, by option, or "" for scratch files."""
        case, config = self.case, self.case.config
        times = HealingSeconds(case, self.rates, self.known)
        steps = times.steps(times.local() if "local" in config.stages else 0.0) if "global" in config.stages else 0
        return healing_memory.files(
            case,
            windows=case.prepared.data.first(max(1, steps) * config.step_sequences).train.sequences,
            bytes_per_token=self.rates.kept_bytes,
            validations=validations_of(steps, case.prepared.data, config),
        )

    def kept(self, files: Mapping[str, int], prefix: str = "--") -> dict[str, tuple[Path, int]]:
        """Return the folders of the user's, and the bytes of `files` that are for them, by option."""
        config = self.case.config
        folders = {"teacher-cache": config.teacher_cache, "checkpoints": config.checkpoints}
        return {
            f"{prefix}{name}": (path, files[f"--{name}"])
            for name, path in folders.items()
            if path is not None and f"--{name}" in files
        }

    @property
    def left_out(self) -> list[str]:
        """What the seconds do not hold, in words."""
        config, found = self.case.config, list[str]()
        if config.teacher_rewrite:
            found.append("answering prompts (--teacher-rewrite)")
        beside = [loss.name for loss in self.case.prepared.losses if loss.entry.needs in ONLY_BESIDE]
        if beside:
            found.append(f"what --loss {' and '.join(beside)} takes beside a pass of the original")
        if config.resume is not None:
            found.append("what --resume saves")
        if "global" in config.stages:
            found.append("what a training saves that ends early because it gains no more")
        return found

    def that_fit(
        self, available: int, foreseen: Callable[[HealingCase], list[StageForesight]], prefix: str = "--"
    ) -> list[str]:
        """Return the single changes, in words, with which all stages take no more than there is.

        Options of healing have the prefix.
        """
        return [
            words
            for words, case in self._other_cases(available, prefix)
            if max(stage.memory_bytes for stage in foreseen(case)) <= available
        ]

    def _other_cases(self, available: int, prefix: str) -> Iterator[tuple[str, HealingCase]]:
        """Yield changes that may take less memory, with what they come to."""
        case, config = self.case, self.case.config
        batch = case.student.batch_size // 2
        while batch:
            yield f"--batch-size {batch}", case.with_sizes(batch_size=batch)
            batch //= 2
        if not case.checkpointing:
            yield f"{prefix}gradient-checkpointing", replace(case, checkpointing=True)
        if case.student.dtype.itemsize > 2:
            yield "--dtype bfloat16", case.with_sizes(dtype=torch.bfloat16)
        if case.both_models and not case.needs & {*ONLY_BESIDE}:
            yield f"no {prefix}both-models", replace(case, both_models=False)
        for train in TRAINED:
            if train == "lora" and "local" in config.stages:
                continue
            try:
                trained = trained_numbers(self.student, self.plan, train, config.lora_rank)
            except UserError:  # there is nothing of it
                continue
            if trained.all < case.trained.all:
                yield f"{prefix}train {train}", replace(case, trained=trained)
        less = {"resident_bytes": min(case.teacher.resident_bytes, available // 2)}
        less |= {"boundary_bytes": min(case.teacher.boundary_bytes, available // 4)}
        if any(value < getattr(case.teacher, name) for name, value in less.items()):
            yield f"--memory-limit {available}", case.with_sizes(**less)
