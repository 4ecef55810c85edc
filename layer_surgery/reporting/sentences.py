"""Plain sentences about a record: what was done, what it saved and what it cost; and how a result is loaded."""

import json
from collections.abc import Iterator
from pathlib import Path

from layer_surgery.checkpoint.heads import EMBEDDING, Head
from layer_surgery.records import CurvePoint, HealingRecord, SurgeryReport
from layer_surgery.records.sweep import SweepBest, SweepReport
from layer_surgery.reporting.derived import changed_layers, items_of, loss_unit, speed_change
from layer_surgery.reporting.formats import number_list, with_interval

#: For the fields of `ChangedLayers`.
_OPERATIONS = (
    *("removed {}", "removed parts of {}", "replaced linears of {} by low-rank components"),
    *("cut channels or heads of {}", "removed experts of {}", "put a linear map in the place of the MLPs of {}"),
)


#: Words for what was trained.
TRAINED_NAMES = {
    "all": "all weights",
    "factors": "linears that the surgery made smaller",
    "operated": "layers that the surgery changed",
    "last": "the last layers and the head",
    "head": "the head",
    "lora": "low-rank adapters, merged",
}
#: Words for the texts that are watched.
_TEXTS = {"validation": "held-out text", "general": "general text"}


def summary(report: SurgeryReport) -> list[str]:
    """Return what a compression did, what it saved and what it cost, a sentence for each."""
    healing = healing_sentence(report)
    return [_done(report), *([healing] if healing else []), *_saved(report), *budgets(report), *_lost(report)]


def _done(report: SurgeryReport) -> str:
    operations = [
        words.format(f"{len(layers)} of {len(report.plan.layers)} layers ({number_list(layers)})")
        for words, layers in zip(_OPERATIONS, changed_layers(report.plan), strict=True)
        if layers
    ]
    solved = len({(record.layer, record.linear) for record in report.refit if record.ridge is not None})
    refit = f", and re-solved {solved} linears so that the rest follows the original" if solved else ""
    return _sentence((" and ".join(operations) or "changed no layer") + refit)


def _saved(report: SurgeryReport) -> Iterator[str]:
    before, after = report.before, report.after
    if before.parameters:
        fewer = 100 * (1 - after.parameters / before.parameters)
        yield (
            f"{fewer:.1f} % fewer parameters: {before.parameters:,} before, {after.parameters:,} after "
            f"({_megabytes(before.size_bytes)} and {_megabytes(after.size_bytes)})."
        )
    speed = speed_change(before, after)
    if speed is not None:
        yield (
            f"{speed.word.capitalize()} at x {speed.ratio:.2f} of the speed ({speed.before:,.1f} and "
            f"{speed.after:,.1f} tokens per second, batch {before.speed[0].batch_size})."
        )


def budgets(report: SurgeryReport) -> Iterator[str]:
    """Yield a sentence for each budget that was set: what it allowed, and what was reached."""
    plan, before, after = report.plan, report.before, report.after
    allowed = {"parameters": float(plan.parameter_bound), **plan.bounds}
    units = {
        "parameters": ("parameters", "parameters"),
        "flops": ("FLOPs per token", "flops_per_token"),
        "kv_cache_bytes": ("bytes per token in the KV cache", "kv_cache_bytes_per_token"),
    }
    for resource, (unit, attribute) in units.items():
        bound, original, reached = allowed.get(resource), getattr(before, attribute), getattr(after, attribute)
        if bound and original and reached is not None and bound < original:
            asked, found = (f"{100 * value / original:.1f} %" for value in (bound, reached))
            yield f"Budget: at most {bound:,.0f} {unit} ({asked} of the original's); reached: {reached:,} ({found})."


def _lost(report: SurgeryReport) -> Iterator[str]:
    for name, change in report.comparison.perplexity.items():
        before, after = report.before.perplexity.get(name), report.after.perplexity.get(name)
        if before is not None and after is not None:
            yield (
                f"Perplexity on {name}: {before.value:,.2f} before, {after.value:,.2f} after, "
                f"x {with_interval(change.ratio, '.3f')}."
            )
    groups = [name for name, task in report.after.tasks.items() if task.group]
    for name in groups or list(report.after.tasks)[:3]:
        for metric, interval in list(report.comparison.tasks.get(name, {}).items())[:1]:
            old, new = (result.tasks[name].metrics[metric].value for result in (report.before, report.after))
            yield (
                f"Task {name} ({metric.partition(',')[0]}): {old:.3f} before, {new:.3f} after, "
                f"{with_interval(interval, '+.3f')}."
            )
    if report.comparison.perplexity or report.comparison.tasks:
        yield "In brackets: 95 % paired bootstrap intervals."
    else:
        yield "Its quality was not compared with the original's."


def refit_sentence(report: SurgeryReport) -> str:
    """Return what the refit did, or ""."""
    records = report.refit
    if not records:
        return ""
    solved = [record for record in records if record.ridge is not None]
    before, after = (
        sorted(getattr(record, field) for record in records)[len(records) // 2]
        for field in ("error_before", "error_after")
    )
    return (
        f"The refit looked at {len(records)} linears in {len({record.layer for record in records})} layers and "
        f"re-solved {len(solved)} of them; the others were left, because no change was better on held-out windows. "
        f"There the median error, as a fraction of what the original gives, went from {before:.4f} to {after:.4f}."
    )


def healing_sentence(report: SurgeryReport) -> str:
    """Return how the result was healed and what came of it, or ""."""
    healing = report.healing
    if healing is None:
        return ""
    did = []
    if healing.local:
        kept = sum(record.kept for record in healing.local)
        did.append(f"trained {kept} of {len(healing.local)} changed layers by themselves to do what the original's do")
    if healing.curve:
        losses = " + ".join(
            loss.name if loss.weight == 1 else f"{loss.weight:g} {loss.name}" for loss in healing.losses
        )
        what = TRAINED_NAMES[healing.train]
        items = items_of(loss_unit(report))
        whom = f"{len(healing.teachers)} teachers" if healing.teachers else "the original"
        did.append(f"trained it on {healing.tokens:,} {items} to follow {whom} ({losses}; {what})")
    said, stopped = " and ".join(did), f"; it ended early: {healing.stopped}" if healing.stopped else ""
    if not healing.helped:
        return _sentence(
            f"{said}, which gained nothing on held-out text, so the result is the model from before healing{stopped}"
        )
    if healing.best_step is None:
        return _sentence(said + stopped)
    first, last = healing.curve[0].validation, _chosen(healing).validation
    change = ", ".join(f"{last[name] - first[name]:+.4f} on {_TEXTS.get(name, name)}" for name in first)
    return _sentence(f"{said}, which changed the loss by {change} ({loss_unit(report)}){stopped}")


def _chosen(healing: HealingRecord) -> CurvePoint:
    """Return the point of the curve whose weights are in the result."""
    return next((point for point in healing.curve if point.step == healing.best_step), healing.curve[0])


def best_sentence(best: SweepBest, directory: Path = Path()) -> str:
    """Say which point of a sweep satisfies the condition, or is nearest to it; `directory` is the sweep's."""
    value = "" if best.value is None else f" ({best.value:.4g})"
    if best.point is not None:
        saved = directory / (best.output or "")
        return f"the smallest model with {best.condition} is {best.point.name}{value}, saved in {saved}"
    if best.nearest is None:
        return f"no point was measured that {best.condition} could be asked of."
    return f"no point satisfies {best.condition}; the nearest is {best.nearest.name}{value}."


def best_note(report: SweepReport) -> list[str]:
    """Return the sentence about the best point, for files in the sweep's directory; nothing without a condition."""
    return [] if report.best is None else [_sentence(best_sentence(report.best))]


def failed_points(report: SweepReport) -> list[str]:
    """Return the name and the error of each point of a sweep that failed."""
    return [f"{point.name}: {point.error}" for point in report.points if point.status == "failed"]


def how_to_load(name: str, head: Head, *, needs_code: bool) -> str:
    """Return Python that loads the result in the directory or repository `name`.

    Args:
        needs_code: whether it loads with `trust_remote_code=True` only (it has low-rank layers).
    """
    # The tokenizer too: transformers looks at the configuration first, and asks on the terminal whether to trust it.
    where = json.dumps(name, ensure_ascii=False)
    remote = ", trust_remote_code=True" if needs_code else ""
    if head is EMBEDDING:
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            f"model = SentenceTransformer({where}{remote})\n"
            'vectors = model.encode(["a text", "another"])'
        )
    return (
        f"from transformers import {head.auto_class}, AutoTokenizer\n\n"
        f'model = {head.auto_class}.from_pretrained({where}, dtype="auto"{remote})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({where}{remote})"
    )


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:].removesuffix('.')}."


def _megabytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size} bytes"
