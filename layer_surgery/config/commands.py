"""The options of each command: the groups that it takes, and its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import attrs

from layer_surgery.config.choices import METHOD_CHOICES, SCORER_CHOICES
from layer_surgery.config.declaring import (
    Group,
    Options,
    about,
    absolute_path,
    at_least,
    models,
    names,
    numbers,
    path,
    whole_numbers,
)
from layer_surgery.config.evaluation import EvaluationConfig
from layer_surgery.config.healing import HealAfterwardsConfig, HealingConfig
from layer_surgery.config.inputs import CalibrationConfig
from layer_surgery.config.runtime import CallConfig, RuntimeConfig
from layer_surgery.config.surgery import (
    DEFAULT_METHOD,
    DEFAULT_SCORER,
    BudgetConfig,
    ChoiceConfig,
    PartConfig,
    RefitConfig,
    SearchConfig,
    check_keep,
)
from layer_surgery.errors import DataError, UserError

# The bases of a class are listed last group first; see evaluation.py.


@attrs.frozen(kw_only=True, slots=False)
class OutputConfig(Options):
    """Where a result goes."""

    GROUP: ClassVar[Group] = "Output"

    output: Path | None = attrs.field(
        default=None, converter=absolute_path, metadata=about("Directory for the compressed model.", metavar="DIR")
    )
    no_save: bool = attrs.field(default=False, metadata=about("Do everything but the writing."))
    overwrite: bool = attrs.field(
        default=False, metadata=about("Replace the output directory if it holds a model already.")
    )


@attrs.frozen(kw_only=True, slots=False)
class DimensionsConfig(Options):
    """How large the vectors of an embedding model become."""

    GROUP: ClassVar[Group] = "Surgery"

    dimensions: int | None = attrs.field(
        default=None,
        validator=at_least(1),
        metadata=about(
            "Numbers in a vector of an embedding model, the most telling first, so that the first half of them is a "
            "vector too.",
            metavar="N",
            default="as many as the original's",
        ),
    )


@attrs.frozen(kw_only=True, slots=False)
class CompressConfig(
    RuntimeConfig,
    OutputConfig,
    EvaluationConfig,
    HealAfterwardsConfig,
    CalibrationConfig,
    DimensionsConfig,
    RefitConfig,
    SearchConfig,
    ChoiceConfig,
    BudgetConfig,
):
    """Options of `compress`."""

    FIRST = ("target_layers", "output", "keep", "target_parameters", "layers", "calibration", "samples", "eval_data")

    resume: Path | None = attrs.field(
        default=None,
        converter=path,
        metadata=about(
            "Keep finished layers here while the run works, so that the same command goes on from them after it was "
            "stopped. It takes the room of the hidden states behind every layer and of the statistics; all is removed "
            "when the run is done.",
            metavar="DIR",
            group="Output",
            recorded=False,
        ),
    )


@attrs.frozen(kw_only=True, slots=False)
class HealConfig(RuntimeConfig, OutputConfig, EvaluationConfig, HealingConfig):
    """Options of `heal`."""

    GROUP: ClassVar[Group] = "Model and data"
    FIRST = ("data", "output", "teacher")

    teacher: tuple[Any, ...] = attrs.field(
        default=(),
        converter=models,
        metadata=about(
            "The original that the result was made of. Of embedding models several may be given, whose vectors are "
            "put side by side: the original, if it is to be one of them, and others, with tokenizers of their own.",
            form="repeat",
            metavar="MODEL",
            default="where surgery.json says it was, if it is still there and the same",
            recorded=False,
        ),
    )

    def _check(self) -> None:
        if not self.data:
            raise DataError("--data names no text to heal on; give a name or a file, such as --data text.txt.")


@attrs.frozen(kw_only=True, slots=False)
class ScoreConfig(RuntimeConfig, CalibrationConfig, PartConfig):
    """Options of `score`."""

    GROUP: ClassVar[Group] = "Surgery"
    FIRST = ("scorer", "target_layers", "calibration", "samples")

    scorer: str = attrs.field(
        default=DEFAULT_SCORER,
        metadata=about("How layers are ranked (see below).", metavar="NAME", default="", choices=SCORER_CHOICES),
    )
    target_layers: int | None = attrs.field(
        default=None,
        metadata=about(
            "Choose the layers for this target (greedy and block scorers need it).", metavar="N", group="Budget"
        ),
    )


@attrs.frozen(kw_only=True, slots=False)
class EvaluateConfig(RuntimeConfig, EvaluationConfig):
    """Options of `evaluate`."""

    GROUP: ClassVar[Group] = "Model and data"
    FIRST = ("baseline", "eval_data")

    baseline: Any = attrs.field(
        default=None,
        metadata=about(
            "A second model to measure on the same tokens, for example the original.",
            metavar="DIR|NAME",
            recorded=False,
        ),
    )
    verify: bool = attrs.field(
        default=False,
        metadata=about("Compare every file of the result with its SHA-256 in surgery.json first."),
    )


@attrs.frozen(kw_only=True, slots=False)
class ExportConfig(CallConfig):
    """Options of `export`."""

    GROUP: ClassVar[Group] = "Output"

    output: Path | None = attrs.field(
        default=None, converter=absolute_path, metadata=about("Directory for the exported model.", metavar="OUT")
    )
    overwrite: bool = attrs.field(
        default=False, metadata=about("Replace the output directory if it holds a result already.")
    )


@attrs.frozen(kw_only=True, slots=False)
class VerifyConfig(CallConfig):
    """Options of `verify`."""

    GROUP: ClassVar[Group] = "Model and data"

    base: str | None = attrs.field(
        default=None,
        converter=attrs.converters.optional(str),
        metadata=about("The original, to compare with.", metavar="MODEL", default="where it was, if it is there"),
    )
    trust_remote_code: bool = attrs.field(
        default=False, metadata=about("Run Python code that comes with the original.")
    )


@attrs.frozen(kw_only=True, slots=False)
class SweepConfig(RuntimeConfig, EvaluationConfig, CalibrationConfig, PartConfig, RefitConfig, SearchConfig):
    """Options of `sweep`: several compressions of one model, every combination of the first four."""

    GROUP: ClassVar[Group] = "Surgery"
    FIRST = ("target_layers", "keep", "method", "scorer", "output", "best", "calibration", "samples", "eval_data")

    target_layers: tuple[int, ...] = attrs.field(
        default=(),
        converter=whole_numbers,
        metadata=about(
            "Numbers of layers left whole.",
            form="list",
            metavar="N,...",
            items="numbers of layers",
            example="11,10,9",
            group="Budget",
        ),
    )
    keep: tuple[float, ...] = attrs.field(
        default=(BudgetConfig.DEFAULT_KEEP,),
        converter=numbers,
        validator=check_keep,
        metadata=about(
            "Fractions of the other layers' parameters to spend on low-rank components; 0 removes the layers outright. "
            "Methods that keep nothing have one point for all of them.",
            form="list",
            metavar="F,...",
            items="fractions",
            example="0,0.1,0.3",
            group="Budget",
        ),
    )
    method: tuple[str, ...] = attrs.field(
        default=(DEFAULT_METHOD,),
        converter=names,
        metadata=about(
            "How low-rank components are made (see below).",
            form="list",
            metavar="NAME,...",
            default="",
            choices=METHOD_CHOICES,
        ),
    )
    scorer: tuple[str, ...] = attrs.field(
        default=(DEFAULT_SCORER,),
        converter=names,
        metadata=about(
            "How layers are ranked (see below).",
            form="list",
            metavar="NAME,...",
            default="",
            choices=SCORER_CHOICES,
        ),
    )
    output: Path | None = attrs.field(
        default=None,
        converter=absolute_path,
        metadata=about(
            "Directory for sweep.json, sweep.csv, sweep.md and the page report.html. A sweep that was stopped goes on "
            "where it was, and one of the same model, data and settings grows by the points that it has not.",
            metavar="DIR",
            group="Output",
        ),
    )
    best: str | None = attrs.field(
        default=None,
        metadata=about(
            "Save the smallest model that satisfies this in DIR/best: 'perplexity<=1.1x' (times the original's), "
            "'perplexity<=20', 'kl_divergence<=0.05' or 'top1_agreement>=0.9'; of several texts the mean counts.",
            metavar="CONDITION",
            group="Output",
        ),
    )
    overwrite: bool = attrs.field(
        default=False, metadata=about("Start anew if the directory holds a sweep already.", group="Output")
    )

    @property
    def directory(self) -> Path:
        """The output, which the command line and the Python interface ask for."""
        assert self.output is not None
        return self.output

    def _check(self) -> None:
        for name in ("target_layers", "keep", "method", "scorer"):
            if not getattr(self, name):
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is empty; give one value, or several with commas between them.")
