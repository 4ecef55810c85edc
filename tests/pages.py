"""Checks of every page with the standard library's parser, and reports that have something everywhere."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from layer_surgery.records import (
    Comparison,
    Continuation,
    Interval,
    SpeedPoint,
    StageFailure,
    SurgeryReport,
    TaskMetric,
    TaskResult,
)

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use"}
#: Markup, control characters, marks of direction, half a character, mathematics, and a word that never ends.
NASTY = "<script>alert('x')</script> & \"q\" \x00\x1b[31m \u202eevil\u202c \ud800 $\\frac{1}$ | `code` " + "W" * 300


class Page(HTMLParser):
    """Reads a page and keeps what is to be checked."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.open: list[str] = []
        self.problems: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.references: list[str] = []
        self.figures: list[dict[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids[values["id"]] += 1
        self.links += [values[name] for name in ("href", "src", "srcset", "action", "xlink:href") if name in values]
        self.references += values.get("aria-labelledby", "").split()
        self.problems += [f"<{tag} {name}>" for name in values if name.startswith("on")]
        if tag == "svg":
            self.figures.append({"role": values.get("role", ""), "title": "", "desc": ""})

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "svg" in self.open and self.open[-1] in ("title", "desc"):
            self.figures[-1][self.open[-1]] += data
        elif "style" not in self.open:
            self.text += data


def checked(html: str) -> Page:
    """Return a page that is well-formed, needs nothing from outside, runs nothing and describes its figures."""
    html.encode("utf-8")
    page = Page(html)
    assert page.problems == []
    assert page.tags["html"] == page.tags["main"] == page.tags["h1"] == 1
    assert not {"script", "iframe", "object", "link", "img", "form"} & page.tags.keys()
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert all(target in page.ids for target in re.findall(r"url\(#([^)]+)\)", html))
    assert all(target in page.ids for target in page.references)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    assert "Content-Security-Policy" in html and 'name="viewport"' in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", html)
    for figure in page.figures:
        assert figure["role"] == "img" and figure["title"].strip() and len(figure["desc"]) > 20
    variables = set(re.findall(r"var\(--([a-z]+)\)", html))
    assert variables <= set(re.findall(r"--([a-z]+):", html))
    return page


def full_report(report: SurgeryReport, text: str = "a text") -> SurgeryReport:
    """Return a report with tasks, speed, continuations and a failure too, all with `text` wherever text may be."""

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        return {f"{text} {name}": value for name, value in values.items()}

    metric = TaskMetric(value=0.6, stderr=0.05, higher_is_better=True)
    task = TaskResult(metrics={"acc": metric, "acc_norm": metric}, items=40, num_fewshot=0, version="1")
    tasks = {f"{text} 1": task, f"{text} 2": task, f"all of {text}": replace(task, group=True, num_fewshot=None)}
    interval = Interval(value=-0.05, low=-0.1, high=0.01, confidence=0.95, pairs=40)
    before, after = (
        replace(result, tasks=tasks, speed=[_speed(tokens_per_second)], perplexity=renamed(result.perplexity))
        for result, tokens_per_second in ((report.before, 100.0), (report.after, 125.0))
    )
    changes = renamed(report.comparison.perplexity)
    return replace(
        report,
        base_model=report.base_model | {"name": text},
        before=before,
        after=after,
        comparison=Comparison(perplexity=changes, tasks={name: {"acc": interval} for name in tasks}),
        continuations=[Continuation(prompt=text, before=f"{text}\n\n\n\nmore", after=text)],
        failures=[StageFailure(stage="speed", error=text)],
        provenance=report.provenance | {"command": f"layer-surgery compress '{text}'"},
        plan=replace(report.plan, predicted_loss_rise=0.125),
    )


def _speed(decode_tokens_per_second: float) -> SpeedPoint:
    return SpeedPoint(
        batch_size=2,
        prompt_tokens=16,
        new_tokens=4,
        repeats=3,
        prefill_tokens_per_second=1000.0,
        decode_tokens_per_second=decode_tokens_per_second,
        time_to_first_token_seconds=0.02,
        latency_p50_seconds=0.01,
        latency_p95_seconds=0.02,
        peak_memory_bytes=10_000_000,
    )
