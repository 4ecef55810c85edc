"""Composes the stages: open, evaluate, score, plan, operate, evaluate, save. The only file that does."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from layer_surgery.checkpoint import Checkpoint, open_checkpoint
from layer_surgery.config import CalibrationConfig, CompressConfig, EvaluationConfig, RuntimeConfig
from layer_surgery.data import check_vocabulary, load_documents, pack_calibration, pack_evaluation
from layer_surgery.errors import CheckpointError, DataError, OutputError, PlanError
from layer_surgery.evaluation.perplexity import perplexity
from layer_surgery.operated import operated_checkpoint
from layer_surgery.provenance import peak_memory_bytes, provenance
from layer_surgery.records import EvaluationResult, LayerScores, SurgeryPlan, SurgeryReport
from layer_surgery.saving import check_output, save_checkpoint, staged_directory
from layer_surgery.scoring import SCORERS, ScoringContext
from layer_surgery.streaming import StreamedModel
from layer_surgery.surgeon import (
    METHODS,
    FactorStore,
    LayerShape,
    ModelShape,
    SurgeryContext,
    check_plan,
    make_plan,
    removal_count,
)
from layer_surgery.tokens import PackedTokens
from layer_surgery.walk import Progress, Walk, WalkSettings, no_progress

REPORT_FILE = "surgery.json"
Model = str | Path | PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Ui:
    """How a run speaks to its user. The default says nothing."""

    progress: Progress = no_progress
    note: Callable[[str], None] = lambda _text: None


@dataclass
class _Clock:
    """Seconds spent in each stage; a stage that is entered twice adds up."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass
class _Session:
    """One opened checkpoint with everything that the stages of a run share."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase | None
    runtime: RuntimeConfig
    device: torch.device
    scratch: Path
    ui: Ui
    clock: _Clock

    @property
    def settings(self) -> WalkSettings:
        return WalkSettings(
            batch_size=self.runtime.batch_size,
            boundary_memory_bytes=self.runtime.boundary_bytes,
            scratch=self.scratch,
            progress=self.ui.progress,
        )

    def stream(self, checkpoint: Checkpoint) -> StreamedModel:
        """Return a model to walk over, its outer weights loaded."""
        return StreamedModel(
            checkpoint,
            device=self.device,
            dtype=self.runtime.torch_dtype(self.device, checkpoint.dtype),
            resident_bytes=self.runtime.resident_bytes,
        )

    def need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise DataError("a model in memory needs its tokenizer: pass tokenizer=.")
        return self.tokenizer

    def calibration_tokens(self, config: CalibrationConfig) -> PackedTokens:
        """Load and pack the calibration data, and say how much of it is used."""
        data = load_documents(config.source, column=config.column, part="calibration")
        tokens = pack_calibration(
            data,
            self.need_tokenizer(),
            samples=config.samples,
            sequence_length=config.sequence_length,
            seed=self.runtime.seed,
        )
        self._check(tokens)
        self.ui.note(
            f"calibration: {int(tokens.valid.sum()):,} of the {tokens.tokens_available:,} tokens of '{tokens.name}', "
            f"as {tokens.sequences} x {tokens.sequence_length}; {tokens.predicted_tokens:,} carry loss"
        )
        return tokens

    def evaluation_tokens(self, config: EvaluationConfig | None) -> list[PackedTokens]:
        """Load and pack every evaluation text."""
        if config is None:
            return []
        packed = []
        for source in config.sources:
            data = load_documents(source, column=config.column, part="evaluation")
            tokens = pack_evaluation(
                data,
                self.need_tokenizer(),
                sequence_length=config.sequence_length,
                max_windows=config.max_windows,
            )
            self._check(tokens)
            self.ui.note(
                f"evaluation: {int(tokens.valid.sum()):,} of the {tokens.tokens_available:,} tokens of "
                f"'{tokens.name}', in {tokens.sequences} windows of {tokens.sequence_length}"
            )
            packed.append(tokens)
        return packed

    def _check(self, tokens: PackedTokens) -> None:
        check_vocabulary(tokens, int(self.checkpoint.skeleton.get_input_embeddings().weight.shape[0]))
        longest = getattr(self.checkpoint.config, "max_position_embeddings", None)
        if longest is not None and tokens.sequence_length > longest:
            raise DataError(
                f"--sequence-length is {tokens.sequence_length}, but {self.checkpoint.name} takes at most {longest}."
            )

    def evaluate(self, checkpoint: Checkpoint, texts: list[PackedTokens]) -> EvaluationResult:
        """Measure size, and perplexity on each text."""
        results = {}
        if texts:
            model = self.stream(checkpoint)
            for tokens in texts:
                results[tokens.name] = perplexity(model, tokens, self.settings)
        return EvaluationResult(
            layers=checkpoint.layer_count,
            parameters=checkpoint.parameters,
            size_bytes=checkpoint.size_bytes,
            perplexity=results,
        )


@contextmanager
def _session(
    model: Model, tokenizer: PreTrainedTokenizerBase | None, runtime: RuntimeConfig, ui: Ui, scratch_parent: Path | None
) -> Iterator[_Session]:
    clock = _Clock()
    device = runtime.torch_device()
    torch.manual_seed(runtime.seed)
    with clock.stage("open"):
        checkpoint = open_checkpoint(model, trust_remote_code=runtime.trust_remote_code)
        if tokenizer is None and checkpoint.directory is not None:
            tokenizer = load_tokenizer(checkpoint)
    parent = runtime.scratch or scratch_parent
    with tempfile.TemporaryDirectory(prefix=".layer-surgery-", dir=parent) as scratch:
        yield _Session(checkpoint, tokenizer, runtime, device, Path(scratch), ui, clock)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a checkpoint; `CheckpointError` if there is none that can be used."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.directory, trust_remote_code=checkpoint.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises many types here, each about these few files
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the tokenizer in {checkpoint.directory} cannot be loaded: {reason}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def run_score(
    model: Model,
    *,
    scorer: str,
    target_layers: int | None,
    calibration: CalibrationConfig,
    runtime: RuntimeConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
) -> LayerScores:
    """Rank the decoder layers of a model."""
    entry = SCORERS[scorer]
    with _session(model, tokenizer, runtime, ui or Ui(), None) as session:
        layer_count = session.checkpoint.layer_count
        if target_layers is not None and not 1 <= target_layers < layer_count:
            raise PlanError(
                f"--target-layers is {target_layers}; allowed: 1 to {layer_count - 1} (the model has {layer_count} layers)."
            )
        count = None if target_layers is None else layer_count - target_layers
        tokens = session.calibration_tokens(calibration) if entry.needs_data else None
        with _walk(session, session.stream(session.checkpoint), tokens) as walk:
            return entry.function(ScoringContext(walk=walk, count=count, seed=runtime.seed))


def run_evaluate(
    model: Model,
    *,
    baseline: Model | None,
    evaluation: EvaluationConfig,
    runtime: RuntimeConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
) -> tuple[EvaluationResult, EvaluationResult | None]:
    """Measure a model and, with `baseline`, another one on the same tokens."""
    with ExitStack() as stack:
        session = stack.enter_context(_session(model, tokenizer, runtime, ui or Ui(), None))
        texts = session.evaluation_tokens(evaluation)
        other = None
        if baseline is not None:
            other = stack.enter_context(_session(baseline, tokenizer, runtime, Ui(), None))
            for ours, theirs in zip(texts, other.evaluation_tokens(evaluation), strict=True):
                if ours.sha256 != theirs.sha256:
                    raise CheckpointError(
                        f"{session.checkpoint.name} and the baseline {other.checkpoint.name} tokenise '{ours.name}' "
                        "differently, so their perplexities cannot be compared; evaluate each by itself."
                    )
            other = replace(other, ui=session.ui)
        result = session.evaluate(session.checkpoint, texts)
        return result, other.evaluate(other.checkpoint, texts) if other is not None else None


def run_compress(
    model: Model,
    config: CompressConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
) -> SurgeryReport:
    """Compress a model: the main job. Everything that can be refused is refused before any work is done."""
    scorer, method = SCORERS[config.scorer], METHODS[config.method]
    if config.output is None and not config.dry_run:
        raise OutputError("give --output (a directory for the compressed model), or --dry-run.")
    if config.method == "remove" and config.budget.keep not in (None, 0):
        raise PlanError(f"--method remove keeps nothing, but --keep is {config.budget.keep}; leave one of them out.")
    if config.method == "remove" and config.budget.target_parameters is not None:
        raise PlanError("--method remove keeps nothing, so --target-parameters cannot be aimed at; use --target-layers.")
    given = SurgeryPlan.read(config.plan_file) if config.plan_file else None
    with ExitStack() as stack:
        staging = None
        if config.output is not None:
            check_output(config.output, overwrite=config.overwrite)
            _check_not_same(model, config.output)
            if not config.dry_run:
                staging = stack.enter_context(staged_directory(config.output, overwrite=config.overwrite))
        session = stack.enter_context(
            _session(model, tokenizer, config.runtime, ui or Ui(), staging.parent if staging else None)
        )
        run = _Compression(config, session, given)
        chooses = given is None and config.budget.layers is None
        count = run.check_budget()
        needs_data = method.needs_boundaries or (chooses and scorer.needs_data)
        tokens = session.calibration_tokens(config.calibration) if needs_data else None
        texts = session.evaluation_tokens(config.evaluation)
        report = run.operate(chooses=chooses, count=count, tokens=tokens, texts=texts, staging=staging)
    return report


@dataclass
class _Compression:
    config: CompressConfig
    session: _Session
    given: SurgeryPlan | None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.session.checkpoint

    def check_budget(self) -> int:
        """Return how many layers are to be operated on; make a trial plan, so that an impossible budget stops here."""
        shape = model_shape(self.checkpoint)
        if self.given is not None:
            check_plan(shape, self.given, f"--plan {self.config.plan_file}")
            return len(self.given.operated)
        count = removal_count(self.config.budget, self.checkpoint.layer_count)
        make_plan(shape, self.config.budget.layers or range(count), self._budget(), self.config.method)
        return count

    def operate(
        self,
        *,
        chooses: bool,
        count: int,
        tokens: PackedTokens | None,
        texts: list[PackedTokens],
        staging: Path | None,
    ) -> SurgeryReport:
        session, config, clock = self.session, self.config, self.session.clock
        sha256 = self._hash()
        self._check_hash(sha256)
        before = after = None
        if config.evaluation is not None:
            with clock.stage("evaluate_before"):
                before = session.evaluate(self.checkpoint, texts)
        scratch = session.scratch / "factors"
        scratch.mkdir()
        factors = FactorStore(scratch, self.checkpoint.dtype)
        method = METHODS[config.method]
        with _walk(session, session.stream(self.checkpoint), tokens) as walk:
            scores = None
            if chooses:
                with clock.stage("score"):
                    scores = SCORERS[config.scorer].function(
                        ScoringContext(
                            walk=walk, count=count, seed=config.runtime.seed, keep_boundaries=method.needs_boundaries
                        )
                    )
            plan = self._plan(scores, count, sha256)
            if plan.low_rank:
                with clock.stage("operate"):
                    method.function(
                        plan,
                        SurgeryContext(
                            model=walk.model,
                            walk=walk if tokens is not None else None,
                            factors=factors,
                            progress=session.ui.progress,
                        ),
                    )
        operated = operated_checkpoint(self.checkpoint, plan, factors)
        if config.evaluation is not None:
            with clock.stage("evaluate_after"):
                after = session.evaluate(operated, texts)
        if staging is not None:
            with clock.stage("save"):
                save_checkpoint(
                    operated, staging, base=self.checkpoint, tokenizer=session.tokenizer, progress=session.ui.progress
                )
                _check_saved(staging, operated)
        report = SurgeryReport(
            base_model=self._base_model(sha256),
            plan=plan,
            scores=scores,
            before=before,
            after=after,
            timings={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
            peak_memory_bytes=peak_memory_bytes(session.device),
            calibration=_describe(tokens),
            provenance=self._provenance(),
            output=str(config.output) if staging is not None else None,
        )
        if staging is not None:
            text = json.dumps(report_dict(report), indent=2, ensure_ascii=False, allow_nan=False)
            (staging / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
        return report

    def _budget(self) -> Any:
        budget = self.config.budget
        return replace(budget, keep=0.0) if self.config.method == "remove" else budget

    def _plan(self, scores: LayerScores | None, count: int, sha256: str) -> SurgeryPlan:
        shape = model_shape(self.checkpoint)
        if self.given is not None:
            plan = check_plan(shape, self.given, f"--plan {self.config.plan_file}")
            return replace(plan, base_sha256=sha256, method=self.config.method)
        chosen = self.config.budget.layers or (scores.removal_order[:count] if scores else ())
        return replace(make_plan(shape, chosen, self._budget(), self.config.method), base_sha256=sha256)

    def _hash(self) -> str:
        with self.session.clock.stage("hash"), self.session.ui.progress("hashing", self.checkpoint.size_bytes >> 22):
            return self.checkpoint.sha256()

    def _check_hash(self, sha256: str) -> None:
        if self.given is not None and self.given.base_sha256 not in ("", sha256):
            raise PlanError(
                f"--plan {self.config.plan_file} was made for another checkpoint (its base_sha256 begins "
                f"{self.given.base_sha256[:12]}, this one's {sha256[:12]}); clear base_sha256 in the plan to apply it all the same."
            )

    def _base_model(self, sha256: str) -> dict[str, Any]:
        checkpoint = self.checkpoint
        return {
            "name": checkpoint.name,
            "model_type": checkpoint.architecture.model_type,
            "sha256": sha256,
            "layers": checkpoint.layer_count,
            "parameters": checkpoint.parameters,
            "size_bytes": checkpoint.size_bytes,
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
        }

    def _provenance(self) -> dict[str, Any]:
        session = self.session
        dtype = self.config.runtime.torch_dtype(session.device, self.checkpoint.dtype)
        return provenance(session.device) | {
            "command": self.config.command,
            "seed": self.config.runtime.seed,
            "compute_dtype": str(dtype).removeprefix("torch."),
            "config": self.config.describe(),
        }


def model_shape(checkpoint: Checkpoint) -> ModelShape:
    """Return the sizes that planning needs. Linears that are low-rank already cannot be replaced again."""
    layers = []
    for index in range(checkpoint.layer_count):
        prefix = checkpoint.layer_prefix(index)
        linears = {}
        for name in checkpoint.architecture.linears:
            spec = checkpoint.source.specs.get(f"{prefix}{name}.weight")
            if spec is not None:
                linears[name] = (spec.shape[0], spec.shape[1])
        layers.append(LayerShape(linears=linears, parameters=checkpoint.layer_parameters(index)))
    return ModelShape(layers=layers, parameters=checkpoint.parameters)


def report_dict(report: SurgeryReport) -> dict[str, Any]:
    """Return what `surgery.json` holds."""
    data = report.to_dict()
    data.pop("output")
    return data


@contextmanager
def _walk(session: _Session, model: StreamedModel, tokens: PackedTokens | None) -> Iterator[Walk]:
    """Yield a walk over the calibration tokens; over a single dummy token if nothing looks at any."""
    if tokens is None:
        one = torch.zeros(1, 1, dtype=torch.int64)
        tokens = PackedTokens(
            name="none", token_ids=one, loss_mask=one > 0, valid=one > 0, tokens_available=0, sha256=""
        )
    with Walk(model, tokens, session.settings) as walk:
        yield walk


def _describe(tokens: PackedTokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    described = {k: v for k, v in asdict(tokens).items() if isinstance(v, str | int)}
    return described | {
        "sequences": tokens.sequences,
        "sequence_length": tokens.sequence_length,
        "tokens": int(tokens.valid.sum()),
        "predicted_tokens": tokens.predicted_tokens,
    }


def _check_not_same(model: Model, output: Path) -> None:
    if not isinstance(model, PreTrainedModel) and output.exists() and Path(model).exists() and output.samefile(model):
        raise OutputError(f"--output {output} is the model itself; give another directory.")


def _check_saved(directory: Path, operated: Checkpoint) -> None:
    """Open what was written: every tensor must be there with its shape, and the parameters must add up."""
    saved = open_checkpoint(directory, trust_remote_code=operated.trust_remote_code)
    if saved.parameters != operated.parameters or saved.low_rank != operated.low_rank:
        raise CheckpointError(f"what was written to {directory} is not what was to be written; this is a bug, report it.")
