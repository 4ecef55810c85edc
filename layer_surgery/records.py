"""The typed records that stages exchange. Each can be written as JSON and read back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from layer_surgery.errors import PlanError

SCHEMA_VERSION = 1  # of plans and evaluations
REPORT_SCHEMA_VERSION = 2  # of `surgery.json`; 1 had no spectra

Action = Literal["keep", "remove", "low_rank"]
ACTIONS: tuple[Action, ...] = ("keep", "remove", "low_rank")
Part = Literal["layer", "attention", "mlp"]
"""What of a layer is operated on."""
PARTS: tuple[Part, ...] = ("layer", "attention", "mlp")
RefitScope = Literal["operated", "all"]
REFIT_SCOPES: tuple[RefitScope, ...] = ("operated", "all")
SpectrumMetric = Literal["fisher", "inputs", "weight"]
"""In which metric: of the task loss, of what the linear reads, or none (the weight as it is)."""


@dataclass(frozen=True, kw_only=True)
class LayerScores:
    """How important each decoder layer is, by one scorer."""

    scorer: str
    source: str
    """URL of the paper."""
    quantity: str
    """What the values are, with their unit."""
    values: list[float]
    """One per layer; higher is more important."""
    removal_order: list[int]
    """Layers in the order in which this scorer would remove them, the first first. It may be shorter than the model
    (greedy scorers go as far as they were asked to) and need not follow `values` (greedy and block scorers)."""
    tokens: int = 0
    """Number of calibration tokens that were looked at."""
    provenance: dict[str, Any] | None = None
    """Versions, hardware and settings where ranking was the whole run; a compression's report has its own."""


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What is done to one decoder layer of the original model (indices count from 0)."""

    index: int
    action: Action
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank of each linear, by its name within the layer; for `low_rank` only. Others of the layer stay whole; of one
    with rank 0 only the bias stays."""


@dataclass(frozen=True, kw_only=True)
class SurgeryPlan:
    """What is done to every layer. Plain data: read it, edit it, apply it with `--plan`."""

    method: str
    target_layers: int
    """Layers left as they are (those of the original that are low-rank already count too)."""
    layers: list[LayerPlan]
    base_sha256: str = ""
    """Hash of the checkpoint that the plan was made for; empty if it is for any."""
    parameters: int = 0
    """Parameters of the operated model."""
    parameter_bound: int = 0
    """The budget: `parameters` is never above it, and below it by less than one rank."""
    predicted_loss_rise: float | None = None
    """Second-order prediction for the calibration data, before any refit, nats per token with loss, where the method
    makes one. Good for comparing plans; for changes as large as most of a layer it is above the measured rise."""
    refit: Literal["", "none", "operated", "all"] = ""
    """Which linears are re-solved afterwards: none, those of the low-rank layers, or also others. "" does not say."""
    schema_version: int = SCHEMA_VERSION

    @property
    def operated(self) -> list[LayerPlan]:
        """Layers that are not kept whole."""
        return [layer for layer in self.layers if layer.action != "keep"]

    @property
    def low_rank(self) -> list[LayerPlan]:
        return [layer for layer in self.layers if layer.action == "low_rank"]

    @property
    def surviving(self) -> list[int]:
        """Indices of the layers that are in the operated model, whole or low-rank."""
        return [layer.index for layer in self.layers if layer.action != "remove"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, origin: str = "the plan") -> SurgeryPlan:
        """Check and read a plan; `origin` (a file name) is what errors call it. Raises `PlanError`."""
        if isinstance(data, dict) and "plan" in data and "layers" not in data:  # a whole surgery.json will do
            data = data["plan"]
        if not isinstance(data, dict):
            raise PlanError(f"{origin} is not a JSON object.")
        version = data.get("schema_version", SCHEMA_VERSION)
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise PlanError(f"{origin} has schema version {version}; this release reads up to {SCHEMA_VERSION}.")
        layers = data.get("layers")
        if layers is None and isinstance(data.get("points"), list):
            raise PlanError(
                f"{origin} is a sweep's, with a plan for every point; save the 'plan' of one and give that."
            )
        if not isinstance(layers, list) or not layers:
            raise PlanError(f"{origin} has no list 'layers'.")
        read = [_layer_from_dict(entry, position, origin) for position, entry in enumerate(layers)]
        refit = data.get("refit", "")
        if refit not in ("", "none", *REFIT_SCOPES):
            raise PlanError(f"{origin} has refit {refit!r}; allowed: none, {', '.join(REFIT_SCOPES)}.")
        whole = sum(layer.action == "keep" for layer in read)
        if data.get("target_layers", whole) != whole:
            raise PlanError(
                f"{origin} says target_layers {data['target_layers']}, but keeps {whole} layers whole; "
                "make the two agree or leave target_layers out."
            )
        return cls(
            method=str(data.get("method", "")),
            target_layers=whole,
            layers=read,
            base_sha256=str(data.get("base_sha256", "")),
            refit=refit,
        )

    @classmethod
    def read(cls, path: Path) -> SurgeryPlan:
        """Read a plan, or the plan in a `surgery.json`."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"--plan {path} cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise PlanError(f"--plan {path} is not JSON ({error}).") from error
        return cls.from_dict(data, str(path))


def _layer_from_dict(entry: Any, position: int, origin: str) -> LayerPlan:
    if not isinstance(entry, dict) or entry.get("index") != position:
        raise PlanError(f"{origin}: entry {position} of 'layers' must have \"index\": {position}.")
    unknown = sorted(set(entry) - {"index", "action", "ranks"})
    if unknown:
        raise PlanError(
            f"{origin}: layer {position} has the unknown field '{unknown[0]}'; allowed: index, action, ranks."
        )
    action = entry.get("action")
    if action not in ACTIONS:
        raise PlanError(f"{origin}: layer {position} has action {action!r}; allowed: {', '.join(ACTIONS)}.")
    ranks = entry.get("ranks") or {}
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
        raise PlanError(f"{origin}: the ranks of layer {position} must be whole numbers from 0 on, by linear.")
    if bool(ranks) != (action == "low_rank"):
        raise PlanError(
            f"{origin}: layer {position} has action {action!r} and {len(ranks)} ranks; only low_rank has any."
        )
    return LayerPlan(index=position, action=action, ranks={str(name): rank for name, rank in ranks.items()})


@dataclass(frozen=True, kw_only=True)
class RefitRecord:
    """One linear that a refit has re-solved, or left as it was because no change was better."""

    layer: int
    """Index in the original."""
    linear: str
    ridge: float | None
    """Chosen on held-out windows, as a multiple of the inputs' mean square; None: left as it was."""
    error_before: float
    """Squared error on held-out windows, as a fraction of the target's sum of squares."""
    error_after: float
    """The same with the ridge that was chosen, solved without these windows."""


@dataclass(frozen=True, kw_only=True)
class SpectrumRecord:
    """The singular values that a method saw when it cut a linear down, thinned out (see `spectra.py`)."""

    layer: int
    """Index in the original."""
    linear: str
    metric: SpectrumMetric
    total: int
    """Number of singular values: min(out, in)."""
    rank: int
    """How many components were kept."""
    kept_share: float
    """Share of the sum of squares of all singular values that the kept components hold, 0 to 1."""
    components: list[int]
    """Numbers of the components that are listed, from 1 on, ascending."""
    values: list[float]
    """Their singular values, descending."""
    kept: list[bool] = field(default_factory=list)
    """Whether each listed component was kept; empty where the kept ones are the first `rank`."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """exp(mean next-token cross-entropy), with the standard error over windows (delta method)."""

    value: float
    stderr: float | None
    """None where there is only one window."""
    tokens: int
    """Predicted tokens."""
    windows: int
    sequence_length: int
    data_sha256: str


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A paired difference (after - before) or ratio (after / before) with its bootstrap confidence interval."""

    value: float
    low: float
    high: float
    confidence: float
    pairs: int
    """Windows or items that both models were measured on."""


@dataclass(frozen=True, kw_only=True)
class PerplexityChange:
    """Perplexity after against before on the same windows."""

    ratio: Interval
    loss_difference: Interval
    """Nats per token."""


@dataclass(frozen=True, kw_only=True)
class KlDivergence:
    """KL(before || after) of the next-token distributions, in nats, over every predicted token."""

    mean: float
    stderr: float | None
    """Standard error of the mean over windows; None where there is only one."""
    p99_9: float
    """99.9th percentile over tokens."""
    maximum: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Top1Agreement:
    """Fraction of predicted tokens for which both models have the same most likely token."""

    value: float
    stderr: float | None
    """Standard error over windows; None where there is only one."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class TaskMetric:
    """One metric of a task over all its items."""

    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What lm-eval measured on one task, or on a group of tasks."""

    metrics: dict[str, TaskMetric]
    """By lm-eval's name: the metric, with a filter after a comma where it is not the only one."""
    items: int
    num_fewshot: int | None
    """None for a group."""
    version: str
    """Of the task, as its configuration says."""
    group: bool = False
    """Whether this is the aggregate of other tasks."""


@dataclass(frozen=True, kw_only=True)
class SpeedPoint:
    """Speed at one batch size and prompt length: medians over runs in which the models took turns."""

    batch_size: int
    prompt_tokens: int
    """Per sequence."""
    new_tokens: int
    """Per sequence."""
    repeats: int
    prefill_tokens_per_second: float
    """Over all sequences of the batch."""
    decode_tokens_per_second: float
    """Over all sequences of the batch."""
    time_to_first_token_seconds: float
    latency_p50_seconds: float
    """Of one decoding step, over all steps of all runs."""
    latency_p95_seconds: float
    peak_memory_bytes: int
    """Weights and the most that was allocated beside them, for this model alone."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What both models write after the same prompt, greedily."""

    prompt: str
    before: str | None
    """None where there is only one model."""
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
    parameters: int
    """Tied parameters count once."""
    size_bytes: int
    """Bytes of all stored tensors."""
    kv_cache_bytes_per_token: int | None
    """In the dtype of the checkpoint, for one sequence. None where it cannot be counted without weights."""
    flops_per_token: int | None
    """Of generating one token behind `flops_context_tokens` others (see evaluation/costs.py); None as above."""
    flops_context_tokens: int
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    speed: list[SpeedPoint] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models measured on the same data. Before is the original or baseline, after the operated model."""

    perplexity: dict[str, PerplexityChange] = field(default_factory=dict)
    kl_divergence: dict[str, KlDivergence] = field(default_factory=dict)
    top1_agreement: dict[str, Top1Agreement] = field(default_factory=dict)
    tasks: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """Difference (after - before) of every metric that is a mean over items."""


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What `layer-surgery evaluate` found: `model` is the one after, `baseline` the one before."""

    model: EvaluationResult
    baseline: EvaluationResult | None
    comparison: Comparison | None
    continuations: list[Continuation]
    failures: list[StageFailure]
    timings: dict[str, float]
    """Seconds for each stage."""
    provenance: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SurgeryReport:
    """All that happened in one compression: what `surgery.json` holds."""

    base_model: dict[str, Any]
    plan: SurgeryPlan
    scores: LayerScores | None
    refit: list[RefitRecord]
    """What was re-solved after the surgery."""
    before: EvaluationResult
    after: EvaluationResult
    comparison: Comparison
    continuations: list[Continuation]
    failures: list[StageFailure]
    """Evaluations that failed; the rest of the report stands."""
    timings: dict[str, float]
    """Seconds for each stage."""
    peak_memory_bytes: int
    """Highest resident memory of the process so far, whatever it has done before this run too."""
    peak_device_memory_bytes: int | None
    """On CUDA, the highest allocated device memory of this run, without the measurement of speed."""
    calibration: dict[str, Any] | None
    provenance: dict[str, Any]
    spectra: list[SpectrumRecord] = field(default_factory=list)
    """Of every linear that a method cut down by a decomposition."""
    output: str | None = None
    """Directory of the saved checkpoint; None for a dry run. Not part of `surgery.json`."""
    schema_version: int = REPORT_SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
