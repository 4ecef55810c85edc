"""Training of a student by transformers' `Trainer` on accelerate: what is ours are the loss, validation and files.

Checkpoints hold the trained parameters as safetensors beside Trainer's own files (optimiser, schedule, state of the
random generators), which Trainer reads with torch's restricted loader: no code in them is run.
"""

from __future__ import annotations

import gc
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from layer_surgery import parallel
from layer_surgery.devices import random_devices, wants_pinned_memory
from layer_surgery.disk.reading import why
from layer_surgery.errors import LayerSurgeryError, NumericalError
from layer_surgery.healing.resuming import STATE_FILE, check_same_length, reading_checkpoint
from layer_surgery.healing.trainee import WEIGHTS_FILE, Trainee
from layer_surgery.healing.windows import HealingData, WindowDataset, training_order
from layer_surgery.records import CurvePoint

#: What torch calls what writes its files, in the errors that it raises on a full disk.
_TORCH_WRITES = "PytorchStreamWriter"
#: What decides which checkpoint is best.
METRIC = "eval_regret"
#: How many validations without a gain, in the second half, end a training.
PATIENCE = 3
WARM_UP = 0.1  #: Share of the steps in which the learning rate rises; after them it falls to 0.
#: How Trainer's log names the mean of a loss since the last validation, and the tokens that it is over.
_LOSS, _TOKENS = "eval_mean_", "eval_tokens"
#: In a checkpoint that can be resumed from: what the training is of.
IDENTITY_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a student is trained."""

    steps: int
    learning_rate: float
    step_sequences: int  #: Sequences in one step of the optimiser.
    batch_size: int  #: Most sequences at a time; changes speed and memory, not results.
    seed: int
    directory: Path  #: For checkpoints.
    device: torch.device
    dtype: torch.dtype  #: Of computation; parameters that are trained are float32.
    keep_state: bool = False  #: Whether checkpoints can be resumed from; else they hold weights only.
    identity: Mapping[str, Any] = field(default_factory=dict)  #: What such checkpoints say that the training is of.
    gradient_checkpointing: bool = False
    report_to: str = "none"
    seconds: float | None = None  #: Stop after so long, whatever the number of steps.
    validations: int = 10  #: How often the student is validated.

    @property
    def micro_batch(self) -> int:
        """The largest number of sequences at a time that divides a process's share of a step."""
        own = self.step_sequences // parallel.group().world
        return max(size for size in range(1, self.batch_size + 1) if own % size == 0)


@dataclass
class Training:
    """A training that has ended: the student has the best weights that were seen."""

    curve: list[CurvePoint]
    best_step: int | None  #: None: no validation was better than before the training.
    steps: int  #: Steps that were taken.
    stopped: str | None = None  #: Why before its time.


def train(
    student: Trainee,
    data: HealingData,
    settings: TrainingSettings,
    *,
    unhealed: dict[str, float],
    say: Callable[[CurvePoint], None] = lambda _point: None,
    advance: Callable[[], None] = lambda: None,
    resume: Path | None = None,
) -> Training:
    """Train the parameters of a student that require gradients, and leave the best weights in it.

    Best is the checkpoint with the lowest cross-entropy on the held-out text, to which a rise on general text is added;
    if none is below what it was before, the student has its first weights again. A loss that is not finite ends the
    training with the best weights so far.

    Args:
        unhealed: validation before the training, by text (`HealingData.texts`).
        say: called with each point of the curve.
        advance: called after each step.
        resume: checkpoint of a training with the same settings to go on from; it ends with the same weights as one that
            was never interrupted.
    """
    if resume is not None:
        check_same_length(resume, settings.steps)
    begun = student.save(settings.directory / "begin")
    watch = _Watch(settings, advance)
    stopped = None
    with _own_random_state(settings.device), ExitStack() as stack:
        trainer = HealingTrainer(student, data, settings, watch, unhealed, say)
        stack.callback(trainer.release)
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
        except NumericalError as error:
            stopped = f"{error}, in step {trainer.state.global_step + 1}"
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and _TORCH_WRITES not in str(error):
                raise
            reason = why(error) if isinstance(error, OSError) else "is the disk full?"
            raise LayerSurgeryError(
                f"a checkpoint of the training cannot be written to {settings.directory} ({reason}); make room, or "
                "give --checkpoints elsewhere."
            ) from error
    # Only the first process is sure to have seen a file that it has written.
    best, value = parallel.from_first(lambda: [trainer.state.best_model_checkpoint, trainer.state.best_metric])
    helped = best is not None and value is not None and value < 0
    student.load(Path(best) / WEIGHTS_FILE if helped and best is not None else begun)
    return Training(
        curve=[_at_the_start(unhealed), *curve_of(trainer.state.log_history, data)],
        best_step=trainer.state.best_global_step if helped else None,
        steps=trainer.state.global_step,
        stopped=stopped or watch.stopped,
    )


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """Give the block random generators of its own: Trainer seeds those of the whole process."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=random_devices(device)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class HealingTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose validation is the cross-entropy on held-out text and on general text, per token."""

    def __init__(
        self,
        student: Trainee,
        data: HealingData,
        settings: TrainingSettings,
        watch: _Watch,
        unhealed: dict[str, float],
        say: Callable[[CurvePoint], None],
    ) -> None:
        self._student, self._data, self._unhealed = student, data, unhealed
        self._batch_size, self._watch, self._say = settings.batch_size, watch, say
        self._identity = settings.identity if settings.keep_state else None
        order = training_order(data, settings.steps, settings.step_sequences, settings.seed)
        windows = WindowDataset(data.train, order)
        super().__init__(
            model=student,
            args=training_arguments(settings),
            train_dataset=windows,
            eval_dataset=windows,  # Trainer asks for one; `evaluate` looks at the texts
            data_collator=windows.collate,
            callbacks=[watch, Patience(PATIENCE)],
        )
        self.remove_callback(PrinterCallback)

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        """Return the loss of a micro-batch; one that is not finite in one process ends the training in all."""
        with parallel.together():
            return super().compute_loss(*given, **named)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read the trained parameters alone, as `save_model` has written them."""
        with reading_checkpoint(Path(resume_from_checkpoint)):
            self._student.load(Path(resume_from_checkpoint) / WEIGHTS_FILE)
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE_FILE))
            curve_of(state.log_history, self._data)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading_checkpoint(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading_checkpoint(Path(checkpoint)):
                super()._load_rng_state(checkpoint)

    def release(self) -> None:
        """Let go of the wrapper around the student: what it does in each backward pass would go on in the next
        training."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the student on the texts that are not trained on; log that with the losses since the last time."""
        found = {name: self._student.measure(name, text, self._batch_size) for name, text in self._data.texts.items()}
        bad = [name for name, value in found.items() if not math.isfinite(value)]
        if bad:
            raise NumericalError(f"the loss on the {bad[0]} text is not finite")
        means, tokens = self._student.sums.take()
        metrics = {f"eval_{name}": value for name, value in found.items()}
        metrics |= {METRIC: regret(found, self._unhealed), "eval_seconds": self._watch.seconds}
        metrics |= {f"{_LOSS}{name}": value for name, value in means.items()}
        self.log(metrics | {_TOKENS: tokens})
        self._say(curve_of(self.state.log_history, self._data)[-1])
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters alone, and what the training is of."""
        if self.args.should_save:
            directory = Path(output_dir or self.args.output_dir)
            self._student.save(directory)
            if self._identity is not None:
                (directory / IDENTITY_FILE).write_text(json.dumps(dict(self._identity), indent=2), encoding="utf-8")


def regret(losses: dict[str, float], unhealed: dict[str, float]) -> float:
    """Return the change of the loss on held-out text and, where it rose, on general text; below 0 is a gain."""
    changes = {name: value - unhealed[name] for name, value in losses.items()}
    return changes.pop("validation") + sum(max(0.0, change) for change in changes.values())


def curve_of(history: list[dict[str, Any]], data: HealingData) -> list[CurvePoint]:
    """Return the curve in Trainer's log, which goes on where a training was resumed."""
    points, tokens = [], 0
    for entry in history:
        if METRIC in entry:
            tokens += entry[_TOKENS]
            losses = {name.removeprefix(_LOSS): value for name, value in entry.items() if name.startswith(_LOSS)}
            validation = {name: entry[f"eval_{name}"] for name in data.texts}
            seconds = entry["eval_seconds"]
            points.append(
                CurvePoint(step=entry["step"], tokens=tokens, seconds=seconds, losses=losses, validation=validation)
            )
    return points


def _at_the_start(unhealed: dict[str, float]) -> CurvePoint:
    return CurvePoint(step=0, tokens=0, seconds=0.0, losses={}, validation=unhealed)


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Ends a training that no longer gains; which weights are taken then is not Trainer's business here."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Say nothing about `load_best_model_at_end`."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **more: Any) -> None:
        """Count in the second half only: a training often gets worse while the learning rate is high."""
        if 2 * state.global_step >= state.max_steps:
            super().on_evaluate(args, state, control, metrics, **more)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Moves the bar, looks at the clock, and has the last step validated and saved."""

    def __init__(self, settings: TrainingSettings, advance: Callable[[], None]) -> None:
        self.stopped: str | None = None
        self._limit, self._advance = settings.seconds, advance
        self._start, self._before = time.monotonic(), 0.0

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self._start = time.monotonic()
        self._before = max((entry.get("eval_seconds", 0.0) for entry in state.log_history), default=0.0)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance()
        limit = self._limit
        if (
            limit is not None
            and not control.should_training_stop
            and parallel.from_first(lambda: time.monotonic() - self._start > limit)
        ):
            self.stopped = f"the time was up after {state.global_step} of {state.max_steps} steps"
            control.should_training_stop = True
        if control.should_training_stop:
            control.should_evaluate = control.should_save = True

    @property
    def seconds(self) -> float:
        """Return how long the training has taken, that before it was resumed included."""
        return round(self._before + time.monotonic() - self._start, 1)


def training_arguments(settings: TrainingSettings) -> TrainingArguments:
    """Return what Trainer is told."""
    every = max(1, settings.steps // settings.validations)
    arguments = TrainingArguments(
        output_dir=str(settings.directory),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.step_sequences // (parallel.group().world * settings.micro_batch),
        train_sampling_strategy="sequential",  # `passes` has chosen the order
        ddp_broadcast_buffers=False,  # they are not trained; and `compute_loss` is to exchange nothing
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(WARM_UP * settings.steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=settings.dtype is torch.bfloat16,
        fp16=settings.dtype is torch.float16,
        use_cpu=settings.device.type == "cpu",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_only_model=not settings.keep_state,
        save_total_limit=None if settings.keep_state else 1,
        load_best_model_at_end=False,
        metric_for_best_model=METRIC,
        greater_is_better=False,
        logging_steps=every,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=settings.report_to,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=settings.seed % 2**32,  # numpy takes no larger one
        activation_checkpointing=settings.gradient_checkpointing,
        dataloader_pin_memory=wants_pinned_memory(settings.device),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # else Trainer would copy the model to every device that it sees
    return arguments
