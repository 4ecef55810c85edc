"""The model card of a result: metadata that the hub reads, and what a user must know.

Metadata: https://huggingface.co/docs/hub/model-cards. `base_model` takes names on the hub only, so a local directory is
named in the text instead.
"""

from collections.abc import Iterator
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from layer_surgery.checkpoint.heads import EMBEDDING
from layer_surgery.checkpoint.origin import is_valid_hub_id
from layer_surgery.records import SurgeryReport
from layer_surgery.records.seal import sealed
from layer_surgery.reporting.derived import head_of
from layer_surgery.reporting.formats import with_interval
from layer_surgery.reporting.measurements import report_tables
from layer_surgery.reporting.provenance import calibration_sources
from layer_surgery.reporting.sentences import healing_sentence, how_to_load, refit_sentence, summary
from layer_surgery.reporting.templates import render
from layer_surgery.reporting.text import printable

#: The hub's names for lm-eval's metrics; others are given as they are.
_METRICS = {"acc": "accuracy", "acc_norm": "accuracy"}


def model_card(report: SurgeryReport, name: str, *, needs_code: bool, note: str = "") -> str:
    """Return the card as Markdown with its metadata. Its last line tells whether anyone has edited it since.

    Args:
        name: of the result.
        needs_code: whether the result loads with `trust_remote_code=True` only.
        note: a sentence before all others.
    """
    columns, tables = report_tables(report)
    text = render(
        "card.md.jinja",
        metadata=metadata(report, name, needs_code=needs_code).to_yaml(line_break="\n").strip(),
        name=name,
        report=report,
        sentences=[note, *summary(report)] if note else summary(report),
        columns=columns,
        tables=tables,
        refit=refit_sentence(report),
        healing=healing_sentence(report),
        healed_on=calibration_sources(report.healing.data if report.healing is not None else None),
        loading=how_to_load(name, head_of(report.base_model), needs_code=needs_code),
        needs_code=needs_code,
        sources=calibration_sources(report.calibration),
        command="\n".join(_commands(report)),
        hub_id=_hub_id(report),
        sha256=report.base_model.get("sha256"),
        licence=report.base_model.get("licence") or {},
    )
    return sealed(text)


def _commands(report: SurgeryReport) -> Iterator[str]:
    """Yield the command of the surgery, where a healing followed as a run of its own, and that of the run."""
    for provenance in (report.provenance.get("surgery") or {}, report.provenance):
        if command := provenance.get("command"):
            yield command


def metadata(report: SurgeryReport, name: str, *, needs_code: bool) -> ModelCardData:
    """Return the head of the card."""
    hub_id = _hub_id(report)
    licence: dict[str, Any] = report.base_model.get("licence") or {}
    tags = ["layer-surgery", "pruning", "model-compression"]
    tags += ["low-rank", "svd"] if report.plan.low_rank else []
    tags += ["width-pruning"] if any(layer.units for layer in report.plan.smaller) else []
    tags += ["custom_code"] if needs_code else []
    results, head = list(_results(report)), head_of(report.base_model)
    return ModelCardData(
        base_model=hub_id,
        # of the hub's relations (adapter, merge, quantized, finetune) the one for weights that were changed
        base_model_relation="finetune" if hub_id else None,
        library_name="sentence-transformers" if head is EMBEDDING else "transformers",
        pipeline_tag=head.pipeline,
        tags=tags,
        eval_results=results or None,
        model_name=printable(name) if results else None,
        **licence,
    )


def _hub_id(report: SurgeryReport) -> str | None:
    """Return the original's name on the hub; None where there is none, or in a stored report one that cannot be."""
    hub_id = report.base_model.get("hub_id")
    return hub_id if is_valid_hub_id(hub_id) else None


def _results(report: SurgeryReport) -> Iterator[EvalResult]:
    task_type = head_of(report.base_model).pipeline
    for text, perplexity in report.after.perplexity.items():
        change = report.comparison.perplexity.get(text)
        against = "" if change is None else f" (of the original's: {with_interval(change.ratio, '.3f')})"
        yield EvalResult(
            task_type=task_type,
            dataset_type=printable(text),
            dataset_name=printable(text),
            dataset_config="text",  # a task may have the same name
            dataset_args={
                "sequence_length": perplexity.sequence_length,
                "windows": perplexity.windows,
                "data_sha256": perplexity.data_sha256,
            },
            metric_type="perplexity",
            metric_value=round(perplexity.value, 4),
            metric_name="perplexity" + against,
        )
    for task, result in report.after.tasks.items():
        for metric, found in result.metrics.items():
            plain = metric.partition(",")[0]
            yield EvalResult(
                task_type=task_type,
                dataset_type=printable(task),
                dataset_name=printable(task),
                dataset_args={"num_fewshot": result.num_fewshot, "items": result.items, "version": result.version},
                metric_type=_METRICS.get(plain, plain),
                metric_value=round(found.value, 4),
                metric_name=metric,
            )
