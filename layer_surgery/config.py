"""Everything that a user can set, with its default, its unit and its check. The only home of defaults."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layer_surgery.errors import PlanError, UserError
from layer_surgery.records import PARTS, REFIT_SCOPES, Part, RefitScope, SurgeryPlan

if TYPE_CHECKING:
    import torch  # at run time only where it is needed: the command line reads defaults from here without it

#: The tool's own use of memory on a CPU must not grow with the model, so these limits are fixed.
CPU_MEMORY_BYTES = 1 << 29
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Where and how computations run."""

    device: str = "auto"
    """`auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`."""
    dtype: str = "auto"
    """dtype of computation: `auto` is float32 on a CPU and the checkpoint's own dtype on CUDA."""
    seed: int = 0
    batch_size: int = 8
    """Sequences at a time. It changes speed and memory, not results (beyond rounding)."""
    trust_remote_code: bool = False
    resident_bytes: int | None = None
    """Keep all layers on the device if together they take at most this much, instead of reading each when needed.
    None is 512 MiB on a CPU and half of the free memory on CUDA."""
    boundary_bytes: int | None = None
    """Keep hidden states at layer boundaries on the device up to this much, and beyond it in a scratch file.
    None is 512 MiB on a CPU and a quarter of the free memory on CUDA."""
    scratch: Path | None = None
    """Directory for scratch files; default: beside the output, else the system's temporary directory."""
    memory_limit: int | None = None
    """Bytes that layers, boundaries and sums may take on the device; default: what is free."""
    cache: Path | None = None
    """Directory where calibration statistics are kept between runs; default: they are not kept."""

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UserError(f"--dtype is '{self.dtype}'; allowed: auto, {', '.join(DTYPES)}.")
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--seed", self.seed, 0)
        if self.memory_limit is not None:
            _at_least("--memory-limit", self.memory_limit, 1)
        if self.seed >= 1 << 63:
            raise UserError(f"--seed is {self.seed}; allowed: 0 to {(1 << 63) - 1}.")

    def torch_device(self) -> torch.device:
        """Return the device; `UserError` if it is not there."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        kind, _, number = name.partition(":")
        if kind not in ("cpu", "cuda") or (number and not number.isdigit()) or name.endswith(":"):
            raise UserError(f"--device is '{self.device}'; allowed: auto, cpu, cuda, cuda:N.")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device is '{self.device}', but torch sees no CUDA device; use --device cpu.")
        if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
            raise UserError(f"--device is '{self.device}', but there are {torch.cuda.device_count()} CUDA devices.")
        return torch.device(name)

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Return `resident_bytes` and `boundary_bytes` for a device."""
        import torch

        resident = boundary = CPU_MEMORY_BYTES
        if device.type == "cuda":
            free, _total = torch.cuda.mem_get_info(device)
            resident, boundary = free // 2, free // 4
        if self.memory_limit is not None:
            resident, boundary = min(resident, self.memory_limit // 2), min(boundary, self.memory_limit // 4)
        return (
            resident if self.resident_bytes is None else self.resident_bytes,
            boundary if self.boundary_bytes is None else self.boundary_bytes,
        )

    def torch_dtype(self, device: torch.device, stored: torch.dtype) -> torch.dtype:
        """Return the dtype of computation on `device` for a checkpoint stored in `stored`."""
        import torch

        if self.dtype != "auto":
            dtype: torch.dtype = getattr(torch, self.dtype)
            return dtype
        return torch.float32 if device.type == "cpu" else stored


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What is passed through the model to calibrate on."""

    DEFAULT_WEIGHT = 1.0

    sources: tuple[str, ...] = ("bundled",)
    """Each is `bundled`, a file (.txt .jsonl .json .csv .parquet) or a hub data set (OWNER/NAME), and may end in
    `:WEIGHT`, its share of the sequences (a number above 0; see DEFAULT_WEIGHT)."""
    column: str | None = None
    samples: int = 128
    """Sequences, from all sources together."""
    sequence_length: int = 256
    """Tokens in a sequence."""

    def __post_init__(self) -> None:
        _at_least("--samples", self.samples, 1)
        if not self.sources:
            raise UserError("--calibration names no data; give a name or a file, or leave it out for the bundled text.")
        if self.samples < len(self.sources):
            raise UserError(
                f"--samples is {self.samples}, but --calibration names {len(self.sources)} sources, and each gives at "
                f"least one sequence; allowed: {len(self.sources)} or more."
            )
        _at_least("--sequence-length", self.sequence_length, 2)


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which lm-eval tasks are run."""

    names: tuple[str, ...] = ()
    """Names of tasks, groups or tags, or YAML files; `bundled` is the set that comes with the project."""
    paths: tuple[Path, ...] = ()
    """Directories with task configurations of the user's."""
    num_fewshot: int | None = None
    """Examples before each item; None is what each task says itself."""
    limit: int | None = None
    """Only the first items of each task; default: all."""

    def __post_init__(self) -> None:
        if self.num_fewshot is not None:
            _at_least("--num-fewshot", self.num_fewshot, 0)
        if self.limit is not None:
            _at_least("--limit", self.limit, 1)
        for name in self.names:
            if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
                raise UserError(f"--tasks names the file {name}, which is not there.")
        for path in self.paths:
            if not path.is_dir():
                raise UserError(f"--task-path {path} is not a directory; give the folder of the task's YAML files.")
        if not self.names:
            for option, given in (
                ("--task-path", self.paths),
                ("--num-fewshot", self.num_fewshot is not None),
                ("--limit", self.limit is not None),
            ):
                if given:
                    raise UserError(f"{option} says how tasks are run, but no task is named; add --tasks NAME.")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How speed and memory of generation are measured."""

    measure: bool = False
    batch_sizes: tuple[int, ...] = (1,)
    """Sequences at a time; every one with every length."""
    prompt_lengths: tuple[int, ...] = (128,)
    """Tokens."""
    new_tokens: int = 32
    """Tokens generated after each prompt."""
    repeats: int = 5
    """Runs of each model, in turns, after one that does not count."""

    def __post_init__(self) -> None:
        for option, values in (
            ("--speed-batch-sizes", self.batch_sizes),
            ("--speed-lengths", self.prompt_lengths),
        ):
            if not values:
                raise UserError(f"{option} is empty; give for example 1,8.")
            for value in values:
                _at_least(option, value, 1)
        _at_least("--speed-new-tokens", self.new_tokens, 2)
        _at_least("--speed-repeats", self.repeats, 1)


@dataclass(frozen=True, kw_only=True)
class ContinuationConfig:
    """Greedy continuations of a few prompts, side by side."""

    DEFAULT_COUNT = 3

    count: int | None = None
    """How many prompts are taken from the first evaluation text. None is 3 if the model is small enough to be in
    memory as a whole by default (`RuntimeConfig.resident_bytes`), and none otherwise."""
    prompts: tuple[str, ...] = ()
    """Prompts of the user's, in the place of those from the text."""
    prompt_tokens: int = 24
    """Length of a prompt from the text."""
    new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.count is not None:
            _at_least("--continuations", self.count, 0)
        if self.count and self.prompts:
            raise UserError("--continuations takes prompts from the text and --prompt gives them; use one of the two.")
        if not all(prompt.strip() for prompt in self.prompts):
            raise UserError("--prompt is empty; give some text to continue.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, and on what."""

    sources: tuple[str, ...] = ("bundled",)
    """Texts for perplexity and distance: names or files; with none, neither is measured."""
    column: str | None = None
    sequence_length: int = 256
    """Tokens in a window."""
    max_windows: int | None = None
    """Take only the first windows of each text; default: all."""
    distance: bool = True
    """KL divergence and top-1 agreement with the original or baseline."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    continuations: ContinuationConfig = field(default_factory=ContinuationConfig)

    def __post_init__(self) -> None:
        _at_least("--sequence-length", self.sequence_length, 2)
        repeated = [name for name in self.sources if self.sources.count(name) > 1]
        if repeated:
            raise UserError(f"--eval-data names '{repeated[0]}' more than once; give each text once.")
        if self.max_windows is not None:
            _at_least("--eval-windows", self.max_windows, 1)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Which layers are operated on, and how many parameters may stay in them."""

    DEFAULT_KEEP = 0.1

    target_layers: int | None = None
    """Layers left whole."""
    layers: tuple[int, ...] | None = None
    """The layers to operate on, counted from 0; None lets the scorer choose."""
    keep: float | None = None
    """Fraction of the operated layers' parameters to spend on low-rank components; None means 0.1."""
    target_parameters: float | None = None
    """The same budget as a fraction of all the model's parameters; excludes `keep`."""
    remove: Part = "layer"
    """What is operated on: whole layers, or only their attention or their MLP. The budget is of these parameters."""

    def __post_init__(self) -> None:
        if self.remove not in PARTS:
            raise PlanError(f"--remove is '{self.remove}'; allowed: {', '.join(PARTS)}.")
        if self.keep is not None and self.target_parameters is not None:
            raise PlanError("--keep and --target-parameters are the same budget in two units; give only one of them.")
        if self.keep is not None and not (math.isfinite(self.keep) and 0 <= self.keep <= 1):
            raise PlanError(f"--keep is {self.keep}; allowed: a fraction from 0 (remove outright) to 1.")
        if self.target_parameters is not None and not 0 < self.target_parameters <= 1:
            raise PlanError(f"--target-parameters is {self.target_parameters}; allowed: a fraction above 0, up to 1.")
        if self.layers is not None:
            repeated = sorted({index for index in self.layers if self.layers.count(index) > 1})
            if not self.layers or repeated:
                raise PlanError(
                    f"--layers must name each layer once; {f'repeated: {repeated}' if repeated else 'none given'}."
                )


@dataclass(frozen=True, kw_only=True)
class RefitConfig:
    """Whether and how what stays is re-solved after the surgery."""

    enabled: bool | None = None
    """None leaves it to the plan, if one is given and says, else to the method."""
    scope: RefitScope = "all"
    """`operated`: low-rank layers only. `all`: also the layer before a removed run, and all after the first cut."""
    general: float = 0.25
    """Sequences of general text (the bundled one) that a refit looks at, for each calibration sequence, so that the
    model does not turn to the calibration data's domain alone; at least 8, if there are as many calibration sequences.
    None beside calibration data that has it already."""

    def __post_init__(self) -> None:
        if self.scope not in REFIT_SCOPES:
            raise UserError(f"--refit-scope is '{self.scope}'; allowed: {', '.join(REFIT_SCOPES)}.")
        if not 0 <= self.general <= 1:
            raise UserError(f"--refit-general is {self.general}; allowed: a fraction from 0 to 1.")


DEFAULT_METHOD = "fisher"


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """One compression."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    scorer: str = "fisher"
    method: str | None = None
    """None is the plan's own method if a plan is given, else `DEFAULT_METHOD`."""
    refit: RefitConfig = field(default_factory=RefitConfig)
    plan: SurgeryPlan | None = None
    """Apply this plan instead of making one."""
    plan_name: str = "--plan"
    """What errors call the plan."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: Path | None = None
    dry_run: bool = False
    overwrite: bool = False
    command: str | None = None
    """The command line that made this, for the report."""

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain JSON, for provenance."""
        return {key: value for key, value in as_json(self).items() if key != "command"}


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Several compressions of one model: every combination of the first four."""

    target_layers: tuple[int, ...]
    keeps: tuple[float, ...] = (BudgetConfig.DEFAULT_KEEP,)
    methods: tuple[str, ...] = (DEFAULT_METHOD,)
    scorers: tuple[str, ...] = (CompressConfig.scorer,)
    remove: Part = "layer"
    refit: RefitConfig = field(default_factory=RefitConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: Path
    """Directory of the results; one that holds some of a sweep with the same settings is gone on with."""
    overwrite: bool = False
    best: str | None = None
    """Save the smallest model that satisfies this, such as `perplexity<=1.1x`."""
    command: str | None = None

    def __post_init__(self) -> None:
        for option, values in (
            ("--target-layers", self.target_layers),
            ("--keep", self.keeps),
            ("--method", self.methods),
            ("--scorer", self.scorers),
        ):
            if not values:
                raise UserError(f"{option} is empty; give one value, or several with commas between them.")


def as_json(config: Any) -> dict[str, Any]:
    """Return a configuration of this module as plain JSON."""
    return {key: _plain(value) for key, value in asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{option} is {value}; allowed: {least} or more.")
