"""The results of a run as a page."""

from __future__ import annotations

from typing import Any

_NAMES = {
    "gold": "tagger trained on gold labels",
    "distilled": "tagger trained on the teacher's labels",
    "compressed": "... with half of its layers removed",
    "healed": "... and healed",
    "llm": "causal LM, fine-tuned, under the grammar",
}


def page(report: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    kinds = list(report["training_labels"])
    speed, causal = report["speed"], report["causal"]
    lines = [
        "# Extraction from synthetic clinical notes",
        "",
        f"**{report['data']}.** So the numbers tell what the recipe does, and nothing about real notes. The lexicon "
        "and the rules were written by the author of the generator. Made by `experiments/clinical/run.py`; all that is "
        "measured is in `results.json` beside this page.",
        "",
        f"{report['notes']['train']['notes']} notes are labelled by a teacher: a causal LM of 10 M parameters, "
        f"fine-tuned on {report['notes']['few']['notes']} gold notes, a lexicon and rules; for each kind by that union "
        f"of them which is best on {report['notes']['choice']['notes']} other gold notes. A tagger is trained on these "
        "labels, half of its layers are removed with the task's loss, calibrated on the same labels, and the result is "
        "healed on the outputs of the tagger from before.",
        "",
        "## The teacher: strict F1 of every union, on the synthetic notes for the choice",
        "",
        *_table(
            ["labellers", *kinds[:-1]],
            [[" + ".join(row["labellers"]), *_best(row, report)] for row in report["unions"]],
        ),
        "",
        "Bold: chosen for this kind.",
        "",
    ]
    for name, title in (("test", "the same templates and terms"), ("external", "held-out templates and terms")):
        notes = report["notes"][name]
        lines += [
            f"## Synthetic test notes with {title}",
            "",
            f"{notes['notes']} notes, {notes['longer_than_a_window']} of them longer than a window of "
            f"{report['encoder']['window']} tokens. F1, strict / overlap, with the 95 % interval of the strict one "
            "over documents.",
            "",
        ]
        rows = [[_NAMES[tag], *(_cell(scores[kind]) for kind in kinds)] for tag, scores in report["f1"][name].items()]
        if name == "test":
            teacher = report["training_labels"]
            rows.insert(0, ["teacher (on the training notes)", *(_cell(teacher[kind]) for kind in kinds)])
        lines += [
            *_table(["", *kinds], rows),
            "",
            "Strict F1 less that of the tagger before compression, in pairs:",
            "",
        ]
        changes = [
            [_NAMES[tag], *(_change(row[kind]) for kind in kinds)] for tag, row in report["differences"][name].items()
        ]
        lines += [*_table(["", *kinds], changes), ""]
    lines += [
        "## Speed on synthetic notes",
        "",
        f"From text to spans, in one thread, by processor time; cost at {speed['price_per_hour']} an hour for "
        "the core.",
        "",
        *_table(
            ["", "documents per second", "times the tagger", "cost of 1,000 documents"],
            [
                [_NAMES[name], rate, speed["times_the_distilled"][name], f"{speed['cost_per_1000'][name]:.6f}"]
                for name, rate in speed["documents_per_second"].items()
            ],
        ),
    ]
    if causal is not None:
        lines += _causal_part(causal, kinds)
    return "\n".join(lines) + "\n"


def _causal_part(causal: dict[str, Any], kinds: list[str]) -> list[str]:
    return [
        "",
        "## The causal LM, compressed with the loss of its answers, on synthetic notes",
        "",
        f"On the first {causal['notes']} test notes. Strict / overlap F1.",
        "",
        *_table(
            ["", *kinds, "answers", "invalid JSON", "strings not in the text"],
            [
                [
                    name,
                    *(_cell(row["f1"][kind]) for kind in kinds),
                    row["sentences"],
                    row["invalid_json"],
                    row["not_in_the_text"],
                ]
                for name, row in causal["models"].items()
            ],
        ),
        "",
        "Compressed less original, all kinds: " + _change(causal["compressed_less_llm"]["all"]) + ".",
        "",
        *(
            f"- Labelling '{name}': {row['sentences']:,} sentences, {row['invalid_json']} answers of invalid JSON, "
            f"{row['not_in_the_text']} strings that are not in their sentence."
            for name, row in causal["labelling"].items()
        ),
    ]


def _best(row: dict[str, Any], report: dict[str, Any]) -> list[str]:
    return [
        f"**{value:.3f}**" if list(report["best_unions"][kind]) == list(row["labellers"]) else f"{value:.3f}"
        for kind, value in row["f1"].items()
    ]


def _cell(scores: dict[str, Any]) -> str:
    strict, overlap = scores["strict"], scores["overlap"]
    return f"{strict['f1']:.3f} / {overlap['f1']:.3f} ({strict['interval'][0]:.3f} to {strict['interval'][1]:.3f})"


def _change(row: dict[str, Any]) -> str:
    return f"{row['change']:+.4f} ({row['interval'][0]:+.4f} to {row['interval'][1]:+.4f})"


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    written = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in written]
