"""Measurements of one model, and of two side by side."""

from dataclasses import asdict, dataclass, field
from typing import Any

from layer_surgery.records.embedding import EmbeddingQuality
from layer_surgery.records.interval import Interval
from layer_surgery.records.shown import Shown

#: Raised whenever what an evaluation's JSON holds changes.
EVALUATION_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp(mean next-token cross-entropy), with the standard error over windows (delta method)."""

    value: float
    stderr: float | None  #: None where there is only one window.
    tokens: int  #: Predicted tokens.
    windows: int
    sequence_length: int
    data_sha256: str


@dataclass(frozen=True, kw_only=True)
class PerplexityChange:
    """Perplexity after against before on the same windows."""

    ratio: Interval
    loss_difference: Interval  #: Nats per token.


@dataclass(frozen=True, kw_only=True)
class KlDivergence:
    """KL(before || after) of the next-token distributions, in nats, over every predicted token."""

    mean: float
    stderr: float | None  #: Standard error of the mean over windows; None where there is only one.
    p99_9: float  #: 99.9th percentile over tokens.
    maximum: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Top1Agreement:
    """Fraction of predicted tokens for which both models have the same most likely token."""

    value: float
    stderr: float | None  #: Standard error over windows; None where there is only one.
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """One metric of a task over all its items."""

    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Metrics of lm-eval (of embedding models: of mteb) on one task, or on a group of tasks."""

    metrics: dict[str, TaskMetric]
    """By lm-eval's name: the metric, with a filter after a comma where it is not the only one. By mteb's: the main
    score, and of tasks with several subsets that of each, after a comma."""
    items: int
    num_fewshot: int | None  #: None for a group.
    version: str  #: Of the task, as its configuration says.
    group: bool = False  #: Whether this is the aggregate of other tasks.


@dataclass(frozen=True, kw_only=True)
class SpeedPoint:
    """Speed at one batch size and prompt length: medians over runs in which the models took turns."""

    batch_size: int
    prompt_tokens: int  #: Per sequence.
    new_tokens: int  #: Per sequence; 0 for models that generate nothing, whose `prefill` is all that they do.
    repeats: int
    prefill_tokens_per_second: float  #: Over all sequences of the batch.
    decode_tokens_per_second: float | None  #: Over all sequences of the batch; None without `new_tokens`.
    time_to_first_token_seconds: float
    latency_p50_seconds: float | None  #: Of one decoding step, over all steps of all runs.
    latency_p95_seconds: float | None
    peak_memory_bytes: int  #: Weights and the most that was allocated beside them, for this model alone.


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Texts that both models write after the same prompt, greedily."""

    prompt: str
    before: str | None  #: None where there is only one model.
    after: str


@dataclass(frozen=True, kw_only=True)
class StageFailure:
    """An evaluation that did not succeed; the others did."""

    stage: str
    error: str


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Size, quality and cost of one model."""

    layers: int
    parameters: int  #: Tied parameters count once.
    size_bytes: int  #: Bytes of all stored tensors.
    kv_cache_bytes_per_token: int | None
    """In the dtype of the checkpoint, for one sequence. None where it cannot be counted without weights."""
    flops_per_token: int | None
    """Of generating one token behind `flops_context_tokens` others (see checkpoint/costs.py); None as above."""
    flops_context_tokens: int
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    speed: list[SpeedPoint] = field(default_factory=list)
    embedding: dict[str, EmbeddingQuality] = field(default_factory=dict)
    """Of an embedding model beside the one before (or its own full vectors, where it is alone), by set of texts."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models measured on the same data. Before is the original or baseline, after the result."""

    perplexity: dict[str, PerplexityChange] = field(default_factory=dict)
    kl_divergence: dict[str, KlDivergence] = field(default_factory=dict)
    top1_agreement: dict[str, Top1Agreement] = field(default_factory=dict)
    tasks: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """Difference (after - before) of every metric of which the items are known: means, and correlations over them."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(Shown):
    """Results of `layer-surgery evaluate`: `model` is the one after, `baseline` the one before."""

    model: EvaluationResult
    baseline: EvaluationResult | None
    comparison: Comparison | None
    continuations: list[Continuation]
    failures: list[StageFailure]
    timings: dict[str, float]  #: Seconds for each stage.
    provenance: dict[str, Any]
    schema_version: int = EVALUATION_SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
