"""One compression: scores, re-solved linears, spectra, and the whole of `surgery.json`."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from layer_surgery.records.evaluation import Comparison, Continuation, EvaluationResult, Interval, StageFailure
from layer_surgery.records.healing import HealingRecord, UnhealedRecord
from layer_surgery.records.plan import SurgeryPlan, UnitName
from layer_surgery.records.shown import Shown

#: Raised whenever what `surgery.json` holds changes; 1 had no spectra, 2 no channels and nested settings, 3 no healing.
REPORT_SCHEMA_VERSION = 5

SpectrumMetric = Literal["fisher", "inputs", "weight"]
"""In which metric: of the task loss, of what the linear reads, or none (the weight as it is)."""


@dataclass(frozen=True, kw_only=True)
class LayerScores(Shown):
    """Importance of each decoder layer, by one scorer."""

    scorer: str
    source: str  #: URL of the paper.
    quantity: str  #: Meaning of the values, with their unit.
    values: list[float]  #: One per layer; higher is more important.
    removal_order: list[int]
    """Layers in the order in which this scorer would remove them, the first first. It may be shorter than the model
    (greedy scorers go as far as they were asked to) and need not follow `values` (greedy and block scorers)."""
    tokens: int = 0  #: Number of calibration tokens that were looked at.
    provenance: dict[str, Any] | None = None
    """Versions, hardware and settings where ranking was the whole run; a compression's report has its own."""


@dataclass(frozen=True, kw_only=True)
class RefitRecord:
    """One linear that a refit has re-solved, or left as it was because no change was better."""

    layer: int  #: Index in the original.
    linear: str
    ridge: float | None  #: Chosen on held-out windows, as a multiple of the inputs' mean square; None: left as it was.
    error_before: float  #: Squared error on held-out windows, as a fraction of the target's sum of squares.
    error_after: float  #: The same with the ridge that was chosen, solved without these windows.


@dataclass(frozen=True, kw_only=True)
class SpectrumRecord:
    """The singular values that a method saw when it cut a linear down, thinned out (see `spectra.py`)."""

    layer: int  #: Index in the original.
    linear: str
    metric: SpectrumMetric
    total: int  #: Number of singular values: min(out, in).
    rank: int  #: How many components were kept.
    kept_share: float  #: Share of the sum of squares of all singular values that the kept components hold, 0 to 1.
    components: list[int]  #: Numbers of the components that are listed, from 1 on, ascending.
    values: list[float]  #: Their singular values, descending.
    kept: list[bool] = field(default_factory=list)
    """Whether each listed component was kept; empty where the kept ones are the first `rank`."""
    units: UnitName | Literal[""] = ""
    """What the components are, where they are not singular vectors but units before this output projection."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of a result, as it was when the result was written."""

    bytes: int | None  #: None for the page and the card, which may be made again.
    sha256: str | None  #: Hexadecimal; None for these too.


@dataclass(frozen=True, kw_only=True)
class SurgeryReport(Shown):
    """All that happened in one compression: the content of `surgery.json`."""

    base_model: dict[str, Any]
    plan: SurgeryPlan
    scores: LayerScores | None
    refit: list[RefitRecord]  #: Linears that were re-solved after the surgery.
    before: EvaluationResult
    after: EvaluationResult
    comparison: Comparison
    continuations: list[Continuation]
    failures: list[StageFailure]  #: Evaluations that failed; the rest of the report stands.
    timings: dict[str, float]  #: Seconds for each stage.
    peak_memory_bytes: int  #: Highest resident memory of the process so far, whatever it has done before this run too.
    peak_device_memory_bytes: int | None
    """On CUDA, the highest allocated device memory of this run, without the measurement of speed."""
    calibration: dict[str, Any] | None
    provenance: dict[str, Any]
    spectra: list[SpectrumRecord] = field(default_factory=list)
    """Of every linear that a method cut down by a decomposition."""
    expected: Interval | None = None
    """Rise of the loss, nats per token, that is to be expected after the refit on text like the calibration data."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Every file of the result but `surgery.json`, by its path in the directory; empty for a dry run, and in results of
    releases up to 0.2."""
    healing: HealingRecord | None = None
    """How the result was healed after the surgery. `after` and `comparison` are of the healed model then."""
    unhealed: UnhealedRecord | None = None  #: The model from before healing.
    output: str | None = None  #: Directory of the saved checkpoint; None for a dry run. Not part of `surgery.json`.
    schema_version: int = REPORT_SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
