"""Results of a sweep, point by point: the content of `sweep.json`."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from layer_surgery.records.evaluation import Comparison, EvaluationResult, Interval, SpeedPoint, StageFailure
from layer_surgery.records.plan import SurgeryPlan
from layer_surgery.records.shown import Shown
from layer_surgery.records.surgery import LayerScores

#: Raised whenever what `sweep.json` holds changes; in 1 plans had no channels, and settings were nested.
SCHEMA_VERSION = 2
#: Under this name `SweepReport.identity` has a hash for each text, in their order.
EVALUATION_DATA = "--eval-data (sha256 of the tokens)"
Front = Literal["parameters", "prefill_speed", "decode_speed"]
FRONTS: tuple[Front, ...] = ("parameters", "prefill_speed", "decode_speed")


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether `one` is at most as large as `other` in both coordinates, and smaller in one."""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@dataclass(frozen=True, kw_only=True, order=True)
class SweepSettings:
    """Options in which the points of a sweep differ: the identity of a point."""

    target_layers: int  #: Layers left whole.
    keep: float  #: Fraction of the other layers' parameters that is kept; 0 with methods that keep nothing.
    method: str
    scorer: str
    refit: bool

    @property
    def name(self) -> str:
        """Name of the point in messages."""
        refit = "refit" if self.refit else "no refit"
        return f"{self.target_layers} layers, keep {self.keep:g}, {self.method}, scorer {self.scorer}, {refit}"


@dataclass(frozen=True, kw_only=True)
class SweepPoint(SweepSettings):
    """One compression that was tried: its plan and what came of it. Nothing of the model is kept."""

    status: Literal["done", "failed"]
    error: str | None = None  #: Why it failed.
    layers: list[int] = field(default_factory=list)  #: Layers that were operated on.
    parameters: int | None = None
    predicted_loss_rise: float | None = None  #: As in `SurgeryPlan`.
    expected: Interval | None = None  #: As in `SurgeryReport`.
    perplexity_ratio: float | None = None
    """Perplexity divided by the original's: the geometric mean over the texts. It is the quality in `fronts`."""
    loss_ratio: float | None = None
    """Of models that are no causal language models, the mean loss divided by the original's: the geometric mean over
    the sets of examples. It takes the place of `perplexity_ratio`."""
    embedding_loss: float | None = None
    """Of embedding models the mean loss against the original, whose own is 0: the mean over the sets of texts. It takes
    the place of `perplexity_ratio`."""
    prefill_speed: float | None = None
    """Tokens per second divided by the original's, which was measured in turns with this point, at the first batch
    size and prompt length. None where speed was not measured."""
    decode_speed: float | None = None  #: The same for decoding.
    fronts: list[Front] = field(default_factory=list)
    """The Pareto fronts that the point is on: no other is as good in both quality and this quantity, and better in
    one."""
    plan: SurgeryPlan | None = None  #: As carried out; `compress --plan` takes it.
    scores: LayerScores | None = None
    result: EvaluationResult | None = None  #: Of the result.
    original_speed: list[SpeedPoint] = field(default_factory=list)  #: Of the original, in turns with this point.
    comparison: Comparison | None = None  #: With the original.
    failures: list[StageFailure] = field(default_factory=list)  #: Evaluations that failed; a point with any has failed.
    seconds: float = 0.0

    @property
    def settings(self) -> SweepSettings:
        """Identity of the point."""
        return SweepSettings(**{each.name: getattr(self, each.name) for each in fields(SweepSettings)})


@dataclass(frozen=True, kw_only=True)
class SweepBest:
    """The smallest point that satisfies a condition."""

    condition: str
    point: SweepSettings | None  #: None if none does.
    nearest: SweepSettings | None  #: Where none does: the point that misses it by least.
    value: float | None  #: The quantity that the condition is about, of `point` or `nearest`.
    output: str | None  #: Where the point's model is saved, relative to the sweep's directory.


@dataclass(frozen=True, kw_only=True)
class SweepReport(Shown):
    """A sweep over the settings of a compression."""

    identity: dict[str, Any]
    """All that decides the results of every point: hashes of the model and of all data, and options. A sweep goes on
    only where it is the same."""
    base_model: dict[str, Any]
    calibration: dict[str, Any] | None
    evaluation: list[dict[str, Any]]  #: The texts.
    original: EvaluationResult | None
    """None until it is measured. Its speed is beside each point, measured in turns with it."""
    failures: list[StageFailure]  #: Evaluations of the original that failed.
    points: list[SweepPoint]
    """In a fixed order: by layers, kept fraction, method, scorer and refit, whichever was measured first."""
    best: SweepBest | None
    provenance: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
