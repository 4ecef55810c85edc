"""One healing: what was trained on what, how the losses went, and whether it helped."""

from dataclasses import dataclass, field
from typing import Any

from layer_surgery.records.evaluation import Comparison, EvaluationResult


@dataclass(frozen=True, kw_only=True)
class LossRecord:
    """One of the losses that were added up."""

    name: str
    weight: float
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LocalRecord:
    """One layer of the local stage. Errors are on windows that it was not trained on."""

    layer: int  #: Index in the original.
    metric: str  #: "nats" (per token, by the gradients of the original's loss) or "squares" (relative to the output's).
    before: float
    after: float
    kept: bool  #: Whether the trained layer took the place of the other.


@dataclass(frozen=True, kw_only=True)
class ProbePoint:
    """A learning rate that was tried."""

    learning_rate: float
    regret: float | None
    """Change of the head's loss after the probe's steps, on held-out text and, where it rose, on general text; None if
    the loss was no longer finite."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The state of a training after some steps."""

    step: int
    tokens: int  #: Tokens with loss (or examples, where each has one answer) that it has been trained on so far.
    seconds: float  #: Since the training began.
    losses: dict[str, float]  #: Mean of each loss over the steps since the last point; {} before the first.
    validation: dict[str, float]  #: The loss of the model's head on texts that are not trained on.


@dataclass(frozen=True, kw_only=True)
class TeacherRecord:
    """One of several teachers of an embedding model."""

    name: str
    sha256: str
    dimensions: int  #: Numbers of its vectors.
    original: bool  #: Whether it is what the result was made of.


@dataclass(frozen=True, kw_only=True)
class HealingRecord:
    """All that happened in one healing: the section `healing` of `surgery.json`."""

    losses: list[LossRecord]
    train: str
    trained_parameters: int
    stages: list[str]
    learning_rate: float | None  #: The highest; None without a global stage.
    steps: int
    step_sequences: int
    tokens: int  #: Tokens with loss (or examples) that the whole model was trained on, repeated ones counted again.
    data: dict[str, Any] | None  #: The text: names, hash, sizes.
    held_out_windows: int
    general_windows: int  #: Windows of general text among those trained on.
    curve: list[CurvePoint]
    best_step: int | None  #: Step whose weights are in the result; None: those from before the global stage.
    helped: bool  #: Whether the result is the healed model; if not, it is the one from before.
    probe: list[ProbePoint] = field(default_factory=list)
    local: list[LocalRecord] = field(default_factory=list)
    stopped: str | None = None  #: Why it ended before its time.
    teacher_bytes_per_token: float | None = None  #: Of what was kept of the original's outputs.
    teachers: list[TeacherRecord] = field(default_factory=list)
    """Those whose vectors were put side by side; empty where the original alone was followed."""


@dataclass(frozen=True, kw_only=True)
class UnhealedRecord:
    """The model after the surgery and before healing."""

    result: EvaluationResult
    comparison: Comparison  #: The original against it.
    gain: Comparison  #: It against the healed model.
