"""One opened checkpoint with everything that the stages of a run share, and how a run speaks to its user."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.heads import CAUSAL_LM
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.config import CalibrationConfig, PerplexityConfig, RuntimeConfig
from layer_surgery.config.inputs import TextConfig
from layer_surgery.data import (
    check_vocabulary,
    load_documents,
    pack_at_most,
    pack_evaluation,
    pack_mixture,
    weighted_sources,
)
from layer_surgery.data.documents import Wanted
from layer_surgery.data.labelled import count_labels
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.data.weights import WeightedSource
from layer_surgery.devices import available_memory_bytes, fast_products, float32_by_onednn, reset_peak_device_memory
from layer_surgery.disk.own import own_directory, remove_dead
from layer_surgery.disk.reading import why
from layer_surgery.errors import DataError, OutputError
from layer_surgery.machine import PACKAGES, code_sha256, release_freed_memory, version
from layer_surgery.progress import Clock, Ui
from layer_surgery.records.provenance import portable
from layer_surgery.runs.notes import calibration_notes, evaluation_note, notes_on
from layer_surgery.runs.tokenizer import check_tokenizer, load_tokenizer
from layer_surgery.walk.self_check import check_walk
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import WalkSettings

#: What folders with scratch files are called.
SCRATCH_PREFIX = ".layer-surgery-"

Model: TypeAlias = str | Path | PreTrainedModel


@dataclass
class Session:
    """One opened checkpoint with everything that the stages of a run share."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase | None
    runtime: RuntimeConfig
    device: torch.device
    dtype: torch.dtype  #: Of computation, for the checkpoint and all that is made of it.
    scratch: Path
    ui: Ui
    clock: Clock
    resident_bytes: int
    boundary_bytes: int
    _proven: list[Checkpoint] = field(default_factory=list)

    @property
    def settings(self) -> WalkSettings:
        """How walks of this run use memory, and how what they see is decomposed."""
        return WalkSettings(
            batch_size=self.runtime.batch_size,
            boundary_memory_bytes=self.boundary_bytes,
            scratch=self.scratch,
            progress=self.ui.progress,
            decomposition=self.runtime.decomposition,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the run: its user is told, and its seconds are counted. What it has freed goes to the system."""
        with self.ui.stage(name), self.clock.stage(name):
            yield
            release_freed_memory()

    def available_bytes(self) -> int | None:
        """Return how much memory the user allows, else what is free on the device; None where that is not known."""
        limit = self.runtime.memory_limit
        return available_memory_bytes(self.device) if limit is None else limit

    @property
    def ahead_bytes(self) -> int:
        """Memory that a layer which is read ahead may take: two models may have one each, beside what they must."""
        return (self.available_bytes() or 0) // 8

    def new_scratch(self, name: str) -> Path:
        """Return a new folder for scratch files."""
        return parallel.new_folder(self.scratch, f"{name}-")

    @contextmanager
    def own_scratch(self, name: str) -> Iterator[Self]:
        """Yield this session with a folder for scratch files that is gone on exit, and with it what was made in it."""
        proven = len(self._proven)
        with parallel.temporary_folder(self.scratch, f"{name}-") as folder:
            try:
                yield replace(self, scratch=folder)
            except Exception as error:
                if parallel.in_step(error):  # the run may go on: nobody is to read what is deleted now
                    parallel.barrier()
                raise
            finally:
                del self._proven[proven:]

    def stream(self, checkpoint: Checkpoint) -> StreamedModel:
        """Return a model to walk over, its outer weights loaded; the first time, prove that it can be walked over."""
        model = StreamedModel(
            checkpoint,
            device=self.device,
            dtype=self.dtype,
            resident_bytes=self.resident_bytes,
            ahead_bytes=self.ahead_bytes,
        )
        if not any(proven is checkpoint for proven in self._proven):
            with self.clock.stage("self_check"):
                check_walk(model)
            self._proven.append(checkpoint)
        return model

    def need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise DataError("a model in memory needs its tokenizer: pass tokenizer=.")
        return self.tokenizer

    def calibration_tokens(self, config: CalibrationConfig) -> PackedTokens:
        """Load and pack the calibration data, and say how much of it is used."""
        sources = weighted_sources(config.calibration)
        tokens = pack_mixture(
            [
                load_documents(
                    source.name,
                    column=_column(config.text_column, source.name),
                    part="calibration",
                    wanted=self._wanted,
                )
                for source in sources
            ],
            [source.weight for source in sources],
            self.need_tokenizer(),
            samples=config.samples,
            sequence_length=config.sequence_length,
            seed=self.runtime.seed,
            objective=self.checkpoint.objective,
            overlap=self._overlap(config),
        )
        self._check(tokens)
        if tokens.objective.labelled:
            self._say_which_labels_are_missing(tokens)
        _check_shares(tokens, self.runtime.batch_size)
        for line in calibration_notes(tokens):
            self.ui.note(line)
        return tokens

    def texts(self, config: CalibrationConfig, most: int) -> PackedTokens:
        """Load and pack so many texts of the calibration data for an embedding model, or as many as there are."""
        return self._at_most(weighted_sources(config.calibration), config, most, alone=False)

    def healing_tokens(self, data: Sequence[str], text: TextConfig, samples: int, option: str) -> PackedTokens:
        """Load and pack text to heal on: `samples` sequences, or as many as there are. Each example has its own."""
        return self._at_most(weighted_sources(data, option), text, samples, alone=True)

    def _at_most(
        self, sources: Sequence[WeightedSource], text: TextConfig, samples: int, *, alone: bool
    ) -> PackedTokens:
        tokens = pack_at_most(
            [
                load_documents(
                    source.name, column=_column(text.text_column, source.name), part="calibration", wanted=self._wanted
                )
                for source in sources
            ],
            [source.weight for source in sources],
            self.need_tokenizer(),
            samples=samples,
            sequence_length=text.sequence_length,
            seed=self.runtime.seed,
            alone=alone,
            objective=self.checkpoint.objective,
            overlap=self._overlap(text),
        )
        self._check(tokens)
        return tokens

    def evaluation_tokens(self, config: PerplexityConfig) -> list[PackedTokens]:
        """Load and pack every evaluation text."""
        packed = []
        for source in config.eval_data:
            data = load_documents(
                source, column=_column(config.text_column, source), part="evaluation", wanted=self._wanted
            )
            tokens = pack_evaluation(
                data,
                self.need_tokenizer(),
                sequence_length=config.sequence_length,
                max_windows=config.eval_windows,
                objective=self.checkpoint.objective,
                seed=self.runtime.seed,
                overlap=self._overlap(config),
            )
            self._check(tokens)
            self.ui.note(evaluation_note(tokens))
            packed.append(tokens)
        hashes = {f"other tokens of '{tokens.name}' (sha256)": tokens.sha256 for tokens in packed}
        parallel.agree(hashes, "give all processes the same evaluation data and tokenizer")
        return packed

    @property
    def _wanted(self) -> Wanted:
        """What data must have beside their text."""
        objective = self.checkpoint.objective
        return "text" if not objective.labelled else "tags" if objective.problem == "tags" else "labels"

    def _overlap(self, text: TextConfig) -> int | None:
        """Return `--window-overlap`; raises `DataError` for a model that does not tag words."""
        if text.window_overlap is not None and self.checkpoint.objective.problem != "tags":
            raise DataError(
                f"--window-overlap divides long examples of a token classifier, but {self.checkpoint.name} is a "
                f"{self.checkpoint.head.words}; leave it out."
            )
        return text.window_overlap

    def _say_which_labels_are_missing(self, tokens: PackedTokens) -> None:
        counts = count_labels(tokens).tolist()
        missing = [name for name, count in zip(tokens.objective.labels, counts, strict=False) if not count]
        if missing:
            self.ui.note(
                f"warning: none of the calibration examples has the label {', '.join(missing)}, so nothing keeps what "
                "the model knows of it; give examples of every label"
            )

    def _check(self, tokens: PackedTokens) -> None:
        check_vocabulary(tokens, self.checkpoint.vocabulary_size)
        longest = self.checkpoint.longest_sequence
        if longest is not None and tokens.sequence_length > longest:
            raise DataError(
                f"--sequence-length is {tokens.sequence_length}, but {self.checkpoint.name} takes at most {longest}."
            )


@contextmanager
def open_session(model: Model, runtime: RuntimeConfig, scratch_parent: Path | None = None) -> Iterator[Session]:
    """Open a model with its tokenizer; scratch files are gone on exit.

    They are in `runtime.scratch`, else in `scratch_parent`, else where the system keeps its temporary files.
    """
    clock, tokenizer, ui = Clock(), runtime.tokenizer, runtime.ui
    _check_processes(runtime)
    device = runtime.torch_device()
    parallel.meet(device)
    with clock.stage("open"):
        checkpoint = open_checkpoint(
            model, trust_remote_code=runtime.trust_remote_code, head=runtime.head, pooling=runtime.pooling
        )
        if checkpoint.head is not CAUSAL_LM:
            parallel.check_alone("a model with another head than that of a causal language model")
        if tokenizer is None and checkpoint.directory is not None:
            tokenizer = load_tokenizer(checkpoint)
        check_tokenizer(checkpoint, tokenizer)
    for line in notes_on(checkpoint):
        ui.note(line)
    reset_peak_device_memory(device)
    dtype = runtime.torch_dtype(device, checkpoint.dtype, checkpoint.hidden_size)
    memory = runtime.memory(device)
    parent = runtime.scratch or scratch_parent or Path(tempfile.gettempdir())
    with parallel.shared_folder(_scratch(parent, ui)) as scratch, fast_products(device):
        yield Session(checkpoint, tokenizer, runtime, device, dtype, scratch, ui, clock, *memory)


@contextmanager
def _scratch(parent: Path, ui: Ui) -> Iterator[Path]:
    """Yield a folder for scratch files that is gone on exit; those that dead runs have left are removed first.

    Raises `OutputError` if it cannot be made.
    """
    for left in remove_dead(parent, SCRATCH_PREFIX):
        ui.note(f"removed {left}, scratch files which a run that was killed has left")
    with ExitStack() as stack:
        try:
            scratch = stack.enter_context(own_directory(parent, SCRATCH_PREFIX))
        except OSError as error:
            raise OutputError(f"scratch files cannot be written to {parent} ({why(error)}).") from error
        yield scratch


def _check_processes(runtime: RuntimeConfig) -> None:
    """Raise `UserError` unless all processes run the same code with the same options."""
    options = {f"--{name.replace('_', '-')}": value for name, value in runtime.described().items()}
    parallel.agree(portable(options), "give all processes the same options")
    running = {name: version(name) for name in PACKAGES} | {"the code (sha256)": code_sha256()}
    parallel.agree(running, "install the same on all machines")
    # Products of matrices are rounded differently by another library, or with another number of threads.
    by_onednn = {"float32 products by oneDNN (as on AMD's CPUs)": float32_by_onednn()}
    parallel.agree(by_onednn, "use machines of one kind")
    parallel.agree({"CPU threads": torch.get_num_threads()}, "set OMP_NUM_THREADS to the same number everywhere")


def _check_shares(tokens: PackedTokens, batch_size: int) -> None:
    """Raise `DataError` unless all processes have the same calibration data, and each a micro-batch of them."""
    parallel.agree(
        {f"other tokens of '{tokens.name}' (sha256)": tokens.sha256},
        "give all processes the same calibration data and tokenizer",
    )
    batches, world = -(-tokens.sequences // batch_size), parallel.group().world
    if batches < world:
        most = tokens.sequences // world
        advice = f"pass --batch-size {most} or less, or " if most else ""
        raise DataError(
            f"{tokens.sequences} calibration sequences in micro-batches of {batch_size} are {batches}, too few for "
            f"{world} processes; {advice}raise --samples, or start fewer processes."
        )


def check_sources(
    column: str | None,
    calibration: Sequence[str] = (),
    evaluation: Sequence[str] = (),
    option: str = "--calibration",
) -> None:
    """Raise `DataError` for wrong weights, and for a column if none of the sources has columns."""
    sources = list(dict.fromkeys([*(source.name for source in weighted_sources(calibration, option)), *evaluation]))
    if column is not None and all(_column(column, source) is None for source in sources):
        raise DataError(
            f"--text-column {column} applies to none of {', '.join(sources) or 'no data'}, which have no columns; "
            "leave it out."
        )


def _column(column: str | None, source: str) -> str | None:
    """Return the column for a source that has columns: not for the bundled text and plain text files."""
    return None if source == "bundled" or source.lower().endswith(".txt") else column
