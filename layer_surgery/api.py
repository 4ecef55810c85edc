"""The Python interface: the same options as the command line, as keyword arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.config import (
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    HealConfig,
    ScoreConfig,
    SweepConfig,
    VerifyConfig,
)
from layer_surgery.config.declaring import expanded
from layer_surgery.config.keywords import on_model, with_output
from layer_surgery.errors import CheckpointError, OutputError, PlanError, ReportError
from layer_surgery.records import EvaluationReport, LayerScores, SurgeryReport
from layer_surgery.records.foresight import Foresight
from layer_surgery.records.sweep import SweepReport
from layer_surgery.records.verification import Verification
from layer_surgery.reporting import notebook  # noqa: F401  lets notebooks show what the functions return
from layer_surgery.reporting.publish import report_on
from layer_surgery.runs.compress import run_compress
from layer_surgery.runs.evaluate import run_evaluate
from layer_surgery.runs.export import DenseExport, run_export
from layer_surgery.runs.foresight.healing import run_foresee_heal
from layer_surgery.runs.foresight.run import run_foresee
from layer_surgery.runs.foresight.sweep import run_foresee_sweep
from layer_surgery.runs.heal import run_heal
from layer_surgery.runs.score import run_score
from layer_surgery.runs.session import Model
from layer_surgery.runs.sweep import run_sweep
from layer_surgery.runs.verify import check_whole, run_verify


@with_output(CompressConfig)
def compress(model: Model, options: CompressConfig) -> SurgeryReport:
    """Make a model smaller where its task needs it least, measure it beside the original, and save it.

    Args:
        model: a local directory, a hub name, or a `PreTrainedModel` (which is not changed; pass its `tokenizer`).
        output: directory to write; required unless `no_save`.

    Returns: the report that is also saved as `surgery.json`. An evaluation that failed is in its `failures`.
    Raises: `layer_surgery.UserError` for what cannot be done as asked, before anything is written.
    """
    return run_compress(model, options)


@with_output(CompressConfig)
def foresee(model: Model, options: CompressConfig) -> Foresight:
    """Say what memory, disk and time `compress` with these options would take on this machine. Compresses nothing.

    Memory and disk follow from the sizes, times from a short probe: a layer of each kind passes a micro-batch.

    Returns: the figures of every stage.
    Raises: `layer_surgery.UserError` for what `compress` would refuse, and for what cannot fit.
    """
    return run_foresee(model, options)


@with_output(SweepConfig)
def foresee_sweep(model: Model, options: SweepConfig) -> Foresight:
    """Say what memory, disk and time `sweep` with these options would take on this machine. Measures no point.

    Points that the `output` holds already are left out. A stage of what is returned is a point, or what all share.
    Raises: `layer_surgery.UserError` for what `sweep` would refuse, and for what cannot fit.
    """
    _check_sweep(options)
    return run_foresee_sweep(model, options)


@with_output(HealConfig)
def heal(model: Model, options: HealConfig) -> SurgeryReport:
    """Train a saved result a little, so that it follows the model that it was made of, and save what comes of it.

    The result is never worse on text that was held out from the `data`: if nothing was gained, it is the model from
    before.

    Args:
        model: a directory that `compress` has written.
        output: directory to write; required unless `no_save`.

    Returns: the report that is also saved as `surgery.json`: that of the surgery, with `healing` and `unhealed`.
    Raises: `layer_surgery.UserError` for what cannot be done as asked, before anything is written.
    """
    return run_heal(model, options)


@with_output(HealConfig)
def foresee_heal(model: Model, options: HealConfig) -> Foresight:
    """Say what memory, disk and time `heal` with these options would take on this machine. Trains nothing.

    Memory and disk follow from the sizes, times from a short probe: some layers of the result pass a micro-batch
    forward and back, and the losses and the optimiser are tried on little.

    Returns: the figures of every stage; those of healing have the names that `timings` of a report has.
    Raises: `layer_surgery.UserError` for what `heal` would refuse, and for what cannot fit.
    """
    return run_foresee_heal(model, options)


@with_output(SweepConfig)
def sweep(model: Model, options: SweepConfig) -> SweepReport:
    """Try every combination of several `target_layers`, `keep`, `method` and `scorer`, and measure each.

    Each point is what `compress` gives with the same options, but calibration data, statistics, scores and the
    measurements of the original are shared, and no model is written but the `best`. Of `continuations` and `prompts`
    only the `best` has any.

    Args:
        output: directory of `sweep.json`, `sweep.csv`, `sweep.md` and the page `report.html`. One that holds some of
            the same sweep is gone on with; points of other combinations that it holds stay in the report.

    Returns: the report that is also `sweep.json`. Points that failed are in it, and are tried again next time.
    Raises: `layer_surgery.UserError` for what cannot be done as asked, before any work is done.
    """
    _check_sweep(options)
    return run_sweep(model, options)


def _check_sweep(options: SweepConfig) -> None:
    if not options.target_layers:
        raise PlanError("give target_layers: the numbers of layers left whole, such as 11,10,9.")
    if options.output is None:
        raise OutputError("give an output: a directory for the sweep.")


@on_model(ScoreConfig)
def score(model: Model, options: ScoreConfig) -> LayerScores:
    """Rank the layers, the least important first. With `target_layers`, greedy and block scorers choose that many."""
    return run_score(model, options)


@on_model(EvaluateConfig)
def evaluate(model: Model, options: EvaluateConfig) -> EvaluationReport:
    """Measure a model, and a `baseline` on the same data.

    The report's `model` is measured after its `baseline`. An evaluation that failed is in `failures`.
    """
    return run_evaluate(model, options)


@with_output(ExportConfig)
def export_dense(model: Model, options: ExportConfig) -> DenseExport:
    """Write a saved checkpoint with low-rank layers as a plain one of its base architecture: factors multiplied out.

    The result computes the same within rounding, and every tool loads it without code of its own. Removed attentions
    and MLPs become zeros. Tokenizer, chat template and `surgery.json` (with a record of the export) come along.
    Raises `layer_surgery.UserError` for a plain checkpoint or an output that may not be written.
    """
    return run_export(model, options)


@on_model(VerifyConfig)
def verify(model: Model, options: VerifyConfig) -> Verification:
    """Compare every file of a saved result with the hash in its `surgery.json`, and its original with the one it was.

    Nothing is loaded or run. What is wrong is in `problems` of what is returned. The hashes stand beside the files, so
    they tell damage and not malice.

    Args:
        model: the directory of a result.

    Raises: `layer_surgery.UserError` for a directory that is no result, or one of a release that wrote no hashes.
    """
    if not isinstance(model, str | Path):
        raise ReportError(f"verify takes the directory of a result, not a {type(model).__name__}.")
    return run_verify(expanded(model), options)


def report(
    *results: str | Path, output: str | Path | None = None, base_model: str | None = None, overwrite: bool = False
) -> tuple[Path, list[str]]:
    """Make the page of a saved result again, with its model card, that of a sweep, or one page that compares several.

    Args:
        results: directories that `compress` or `sweep` has written, or the `surgery.json` of a result.
        output: file of the page; needed for several results. Default: `report.html` in the only one.
        base_model: name of the original on the hub, for the model card.
        overwrite: replace `output` if it exists, or a model card that somebody has edited.

    Returns: where the page is, and notes on what was left as it is.
    Raises: `layer_surgery.UserError` for what is no report or may not be written, before anything is.
    """
    return report_on(
        [expanded(path) for path in results],
        expanded(output) if output is not None else None,
        base_model=base_model,
        overwrite=overwrite,
    )


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    verify: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a saved checkpoint, plain or with low-rank layers, as a transformers model. No remote code is run.

    With `verify` every file of a result is compared with its SHA-256 in `surgery.json` first, which reads it once more.
    Further keyword arguments (`device_map`, `attn_implementation`, ...) go to `from_pretrained`.
    Raises `CheckpointError` if a tensor is missing or damaged, where transformers would fill in random numbers, and
    with `verify` if a file is not what was written.
    """
    if verify:
        check_whole(expanded(directory))
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    if checkpoint.directory is not None and (checkpoint.directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} has a PEFT adapter beside its weights, which transformers would put into the model; "
            "move adapter_config.json away, or load with transformers."
        )
    loader: Any = checkpoint.model_class or getattr(transformers, checkpoint.head.auto_class)
    if checkpoint.model_class is None:
        kwargs["trust_remote_code"] = trust_remote_code
    model: PreTrainedModel = loader.from_pretrained(
        checkpoint.directory, config=checkpoint.config, dtype=dtype, use_safetensors=True, **kwargs
    )
    return model
