"""The Python interface: the same options as the command line, as keyword arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.config import (
    BudgetConfig,
    CalibrationConfig,
    CompressConfig,
    EvaluationConfig,
    RefitConfig,
    SweepConfig,
)
from layer_surgery.options import Options, RuntimeOptions, evaluation_config, names_of, runtime_config, several
from layer_surgery.progress import Ui
from layer_surgery.records import EvaluationReport, LayerScores, Part, RefitScope, SurgeryPlan, SurgeryReport
from layer_surgery.records.sweep import SweepReport
from layer_surgery.reporting.publish import report_on
from layer_surgery.runs.compress import run_compress
from layer_surgery.runs.export import DenseExport, run_export
from layer_surgery.runs.session import Model
from layer_surgery.runs.standalone import run_evaluate, run_score
from layer_surgery.runs.sweep import run_sweep

_CALIBRATION = CalibrationConfig()
_EVALUATION = EvaluationConfig()
_COMPRESS = CompressConfig()


def compress(
    model: Model,
    output: str | Path | None = None,
    *,
    target_layers: int | None = None,
    keep: float | None = None,
    target_parameters: float | None = None,
    layers: Sequence[int] | None = None,
    remove: Part = "layer",
    scorer: str = _COMPRESS.scorer,
    method: str | None = None,
    refit: bool | None = None,
    refit_scope: RefitScope = _COMPRESS.refit.scope,
    refit_general: float = _COMPRESS.refit.general,
    calibration: str | Path | Sequence[str | Path] = _CALIBRATION.sources,
    samples: int = _CALIBRATION.samples,
    sequence_length: int = _CALIBRATION.sequence_length,
    text_column: str | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = _EVALUATION.sources,
    eval_windows: int | None = None,
    plan: str | Path | SurgeryPlan | dict[str, Any] | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
    command: str | None = None,
    **options: Unpack[Options],
) -> SurgeryReport:
    """Remove the least important decoder layers of a causal LM and save the result.

    Args:
        model: a local directory, a hub name, or a `PreTrainedModel` (which is not changed; pass its `tokenizer`).
        output: directory to write; required unless `dry_run`.
        target_layers: how many layers stay whole.
        keep: fraction of the operated layers' parameters to spend on low-rank components (default 0.1; 0 removes).
        target_parameters: the same budget as a fraction of all parameters; excludes `keep`.
        layers: the layers to operate on, counted from 0, instead of the scorer's choice.
        remove: `"layer"`, or only their `"attention"` or `"mlp"`; the budget is then of these.
        scorer, method: names, see `layer-surgery compress --help`.
        refit: re-solve what stays so that it follows the original; None leaves it to the method. `refit_scope` is `all`
            or `operated` (low-rank layers only, so that whole layers stay as they are, bit for bit), `refit_general`
            the number of sequences of general text that the refit looks at for each calibration sequence.
        calibration: `"bundled"`, a file, or a hub data set; `samples` sequences of `sequence_length` tokens. Several
            are mixed, for example `["task.jsonl:2", "bundled:1"]`: two thirds of the sequences come from the first.
            A weight (default 1) is a share of sequences, not of the tokens that carry loss.
        eval_data: texts for perplexity before and after; None or empty measures size only.
        plan: a plan, or the file of a plan or a `surgery.json`, to apply as it is.
        options: what is measured beside perplexity: `distance`, `tasks`, `task_path`, `num_fewshot`, `limit`, `speed`,
            `speed_batch_sizes`, `continuations`, `prompts`, ... (`EvaluationOptions`), and `device`, `dtype`, `seed`,
            `batch_size`, `trust_remote_code`, `scratch`, ... (`RuntimeConfig`).

    Returns: the report that is also saved as `surgery.json`. An evaluation that failed is in its `failures`.
    Raises: `layer_surgery.errors.UserError` for what cannot be done as asked, before anything is written.
    """
    config = CompressConfig(
        budget=BudgetConfig(
            target_layers=target_layers,
            keep=keep,
            target_parameters=target_parameters,
            layers=tuple(layers) if layers is not None else None,
            remove=remove,
        ),
        scorer=scorer,
        method=method,
        refit=RefitConfig(enabled=refit, scope=refit_scope, general=refit_general),
        plan=_plan(plan),
        plan_name=f"--plan {plan}" if isinstance(plan, str | Path) else "the given plan",
        calibration=CalibrationConfig(
            sources=names_of(calibration), column=text_column, samples=samples, sequence_length=sequence_length
        ),
        evaluation=evaluation_config(eval_data, text_column, sequence_length, eval_windows, options),
        runtime=runtime_config(options),
        output=Path(os.path.abspath(Path(output).expanduser())) if output is not None else None,
        dry_run=dry_run,
        overwrite=overwrite,
        command=command,
    )
    return run_compress(model, config, tokenizer=tokenizer, ui=ui)


def sweep(
    model: Model,
    output: str | Path,
    *,
    target_layers: int | Sequence[int],
    keep: float | Sequence[float] = SweepConfig.keeps,
    method: str | Sequence[str] = SweepConfig.methods,
    scorer: str | Sequence[str] = SweepConfig.scorers,
    best: str | None = None,
    remove: Part = "layer",
    refit: bool | None = None,
    refit_scope: RefitScope = _COMPRESS.refit.scope,
    refit_general: float = _COMPRESS.refit.general,
    calibration: str | Path | Sequence[str | Path] = _CALIBRATION.sources,
    samples: int = _CALIBRATION.samples,
    sequence_length: int = _CALIBRATION.sequence_length,
    text_column: str | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = _EVALUATION.sources,
    eval_windows: int | None = None,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
    command: str | None = None,
    **options: Unpack[Options],
) -> SweepReport:
    """Try every combination of several `target_layers`, `keep`, `method` and `scorer`, and measure each.

    Each point is what `compress` gives with the same options, but calibration data, statistics, scores and the
    measurements of the original are shared, and no model is written but the `best`.

    Args:
        output: directory of `sweep.json`, `sweep.csv`, `sweep.md` and the page `report.html`. One that holds some of
            the same sweep is gone on with; points of other combinations that it holds stay in the report.
        best: save the smallest model that satisfies this in `output/best`: `"perplexity<=1.1x"` (times the original's),
            `"perplexity<=20"`, `"kl_divergence<=0.05"`, `"top1_agreement>=0.9"`. With several texts their mean counts.
        refit: for all points; None leaves it to each method.
        overwrite: start anew in a directory that holds a sweep.

    Other arguments as for `compress`; of `continuations` and `prompts` only the `best` has any.

    Returns: the report that is also `sweep.json`. Points that failed are in it, and are tried again next time.
    Raises: `layer_surgery.errors.UserError` for what cannot be done as asked, before any work is done.
    """
    config = SweepConfig(
        target_layers=tuple(several(target_layers)),
        keeps=tuple(several(keep)),
        methods=tuple(several(method)),
        scorers=tuple(several(scorer)),
        remove=remove,
        refit=RefitConfig(enabled=refit, scope=refit_scope, general=refit_general),
        calibration=CalibrationConfig(
            sources=names_of(calibration), column=text_column, samples=samples, sequence_length=sequence_length
        ),
        evaluation=evaluation_config(eval_data, text_column, sequence_length, eval_windows, options),
        runtime=runtime_config(options),
        output=Path(os.path.abspath(Path(output).expanduser())),
        overwrite=overwrite,
        best=best,
        command=command,
    )
    return run_sweep(model, config, tokenizer=tokenizer, ui=ui)


def score(
    model: Model,
    *,
    scorer: str = _COMPRESS.scorer,
    target_layers: int | None = None,
    remove: Part = "layer",
    calibration: str | Path | Sequence[str | Path] = _CALIBRATION.sources,
    samples: int = _CALIBRATION.samples,
    sequence_length: int = _CALIBRATION.sequence_length,
    text_column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
    command: str | None = None,
    **runtime: Unpack[RuntimeOptions],
) -> LayerScores:
    """Rank the decoder layers by importance. With `target_layers`, greedy and block scorers choose that many.

    Arguments as for `compress`.
    """
    return run_score(
        model,
        scorer=scorer,
        target_layers=target_layers,
        remove=remove,
        calibration=CalibrationConfig(
            sources=names_of(calibration), column=text_column, samples=samples, sequence_length=sequence_length
        ),
        runtime=runtime_config(runtime),
        tokenizer=tokenizer,
        ui=ui,
        command=command,
    )


def evaluate(
    model: Model,
    *,
    baseline: Model | None = None,
    eval_data: str | Path | Sequence[str | Path] | None = _EVALUATION.sources,
    sequence_length: int = _EVALUATION.sequence_length,
    eval_windows: int | None = None,
    text_column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ui: Ui | None = None,
    command: str | None = None,
    **options: Unpack[Options],
) -> EvaluationReport:
    """Measure a model, and a `baseline` on the same data. Arguments as for `compress`.

    The report's `model` is measured after its `baseline`. An evaluation that failed is in `failures`.
    """
    return run_evaluate(
        model,
        baseline=baseline,
        evaluation=evaluation_config(eval_data, text_column, sequence_length, eval_windows, options),
        runtime=runtime_config(options),
        tokenizer=tokenizer,
        ui=ui,
        command=command,
    )


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
    Raises: `layer_surgery.errors.UserError` for what is no report or may not be written, before anything is.
    """
    return report_on(
        [Path(path).expanduser() for path in results],
        Path(output).expanduser() if output is not None else None,
        base_model=base_model,
        overwrite=overwrite,
    )


def load(
    directory: str | Path, *, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a saved checkpoint, plain or with low-rank layers, as a transformers model. No remote code is run.

    Further keyword arguments (`device_map`, `attn_implementation`, ...) go to `from_pretrained`.
    Raises `CheckpointError` if a tensor is missing or damaged, where transformers would fill in random numbers.
    """
    checkpoint = open_checkpoint(directory, trust_remote_code=trust_remote_code)
    loader: Any = checkpoint.model_class or AutoModelForCausalLM
    if checkpoint.model_class is None:
        kwargs["trust_remote_code"] = trust_remote_code
    model: PreTrainedModel = loader.from_pretrained(
        checkpoint.directory, config=checkpoint.config, dtype=dtype, use_safetensors=True, **kwargs
    )
    return model


def export_dense(
    directory: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    ui: Ui | None = None,
    command: str | None = None,
) -> DenseExport:
    """Write a saved checkpoint with low-rank layers as a plain one of its base architecture: factors multiplied out.

    The result computes the same within rounding, and every tool loads it without code of its own. Removed attentions
    and MLPs become zeros. Tokenizer, chat template and `surgery.json` (with a record of the export) come along.
    Raises `layer_surgery.errors.UserError` for a plain checkpoint or an output that may not be written.
    """
    return run_export(
        directory,
        Path(os.path.abspath(Path(output).expanduser())),
        overwrite=overwrite,
        command=command,
        progress=(ui or Ui()).progress,
    )


def _plan(plan: str | Path | SurgeryPlan | dict[str, Any] | None) -> SurgeryPlan | None:
    if plan is None or isinstance(plan, SurgeryPlan):
        return plan
    return SurgeryPlan.from_dict(plan) if isinstance(plan, dict) else SurgeryPlan.read(Path(plan))
