"""The report: tables and plots from the measurements. Computes nothing but means over seeds and ratios.

    python experiments/task_aware/page.py

Reads reports/task_aware/*.json; writes results.md and the plots beside them.
"""

from __future__ import annotations

import json
import statistics as numbers
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parents[2] / "reports" / "task_aware"
#: Colours that the colour-blind can tell apart (Okabe & Ito).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
NAMES = {
    ("remove", True, False): "removed outright",
    ("laco", True, False): "LaCo merge",
    ("replaceme", True, False): "ReplaceMe",
    ("svd", True, False): "SVD",
    ("grasp", True, False): "GRASP, one backward walk",
    ("grasp_sequential", True, False): "GRASP as published",
    ("svd_llm", True, False): "SVD-LLM",
    ("fisher", True, False): "fisher, no refit, layers by block influence",
    ("grasp", False, False): "GRASP on our layers",
    ("fisher", False, False): "fisher, no refit",
    ("remove", False, True): "**removed outright + refit**",
    ("fisher", False, True): "**fisher + refit**",
}


def read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}


def noted(report: dict[str, Any]) -> list[str]:
    """Return what a report says of how it came about, if it does."""
    return [report["note"], ""] if "note" in report else []


def mean(values: list[float]) -> str:
    """Return the mean with the range over seeds."""
    centre = numbers.mean(values)
    return f"{centre:.3f} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else f"{centre:.3f}"


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return list(rows[0]["extra_loss"]) if rows else []


def comparison(rows: list[dict[str, Any]]) -> list[str]:
    """Return the main table: extra loss of every method, mean over seeds, and what it is of GRASP's."""
    lines: list[str] = []
    names = texts(rows)
    for target in sorted({row["target_layers"] for row in rows}, reverse=True):
        here = [row for row in rows if row["target_layers"] == target]
        lines += [
            f"### {target} of 12 layers whole",
            "",
            "| | parameters | " + " | ".join(f"extra loss, {Path(n).stem}" for n in names) + " | of GRASP's |",
            "|---|---|" + "---|" * (len(names) + 1),
        ]
        grasp = numbers.mean(row["extra_loss"][names[0]]["rise"] for row in here if key(row) == ("grasp", True, False))
        for which, title in NAMES.items():
            found = [row for row in here if key(row) == which]
            if not found:
                continue
            cells = [mean([row["extra_loss"][name]["rise"] for row in found]) for name in names]
            share = numbers.mean(row["extra_loss"][names[0]]["rise"] for row in found) / grasp
            lines.append(
                f"| {title} | {found[0]['parameters'] / 1e6:.2f} M | " + " | ".join(cells) + f" | {share:.2f} |"
            )
        chosen = {str(row["layers"]) for row in here if key(row) == ("fisher", False, True)}
        lines += ["", f"Layers chosen by ours: {', '.join(sorted(chosen))}.", ""]
    return lines


def key(row: dict[str, Any]) -> tuple[str, bool, bool]:
    return row["method"], row["published_layers"], row["refit"]


def plot_curves(rows: list[dict[str, Any]]) -> None:
    """Extra loss against parameters, one curve for each method, one panel for each text."""
    names = texts(rows)
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        curves = sorted({key(row) for row in rows}, key=list(NAMES).index)
        for number, which in enumerate(curves):
            points = sorted((r["parameters"] / 1e6, r["extra_loss"][name]["rise"]) for r in rows if key(r) == which)
            label = NAMES[which].strip("*")
            axis.plot(*zip(*points, strict=True), marker="o^sDvPX"[number % 7], color=COLOURS[number], label=label)
        axis.set(xlabel="parameters (millions)", ylabel="extra loss (nats per token)", title=Path(name).stem)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(labels), fontsize=8)
    save(figure, "curves")


def plot_prediction(rows: list[dict[str, Any]]) -> None:
    """Predicted against measured rise of the loss, without a refit (which the prediction does not know) and with."""
    figure, axis = plt.subplots(figsize=(5.2, 4.6))
    name = texts(rows)[0]
    for number, refit in enumerate((False, True)):
        points = [
            (row["predicted_loss_rise"], row["extra_loss"][name]["rise"])
            for row in rows
            if row["predicted_loss_rise"] is not None and row["refit"] == refit
        ]
        label = "after the refit" if refit else "no refit"
        axis.scatter(*zip(*points, strict=True), color=COLOURS[number], marker="o^"[number], label=label, alpha=0.8)
    most = max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([0, most], [0, most], color="black", linewidth=0.8, linestyle="--", label="predicted = measured")
    axis.set(
        xlabel="predicted rise, calibration data (nats per token)",
        ylabel=f"measured rise, {Path(name).stem} (nats per token)",
        xlim=(0, None),
        ylim=(0, None),
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, "prediction")


def plot_tokens(rows: list[dict[str, Any]]) -> None:
    """Extra loss against the number of calibration tokens."""
    names = texts(rows)
    figure, axis = plt.subplots(figsize=(5.6, 4.2))
    number = 0
    for name in names:
        for refit in (False, True):
            points = sorted((r["tokens"], r["extra_loss"][name]["rise"]) for r in rows if r["refit"] == refit)
            label = f"{Path(name).stem}, {'refit' if refit else 'no refit'}"
            axis.plot(*zip(*points, strict=True), marker="o^sD"[number], color=COLOURS[number], label=label)
            number += 1
    axis.set(xscale="log", xlabel="calibration tokens", ylabel="extra loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    save(figure, "tokens")


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(FOLDER / f"{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def ablation(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table for each part of the ablation."""
    titles = {
        "parts": "Which part buys what (each row adds to those above)",
        "ridge": "Ridge: one for every matrix, instead of chosen on held-out windows",
        "damping": "Damping: one share of the identity for every moment, instead of estimated (no refit)",
        "tokens": "Calibration tokens",
    }
    lines: list[str] = []
    names = texts(rows)
    for part, title in titles.items():
        here = [row for row in rows if row["part"] == part]
        if not here:
            continue
        lines += [f"### {title}", "", "| | tokens | " + " | ".join(Path(n).stem for n in names) + " |"]
        lines += ["|---|---|" + "---|" * len(names)]
        for row in here:
            cells = [f"{row['extra_loss'][n]['rise']:.4f} ± {row['extra_loss'][n]['stderr']:.4f}" for n in names]
            lines.append(f"| {row['setting']} | {row['tokens']:,} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def tasks(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table for each task: calibrations against what was measured, means over seeds."""
    if len(rows) < 2:
        return []
    dense, points = rows[0], rows[1:]
    kinds = list(dict.fromkeys(row["calibration"] for row in points))
    lines: list[str] = []
    for name, original in dense["tasks"].items():
        lines += [
            f"### {name}",
            "",
            f"The original: accuracy {original['accuracy']:.3f}, loss of the answer {original['answer_loss']:.3f} nats "
            f"per token, log loss of the choice {original['choice_loss']:.3f} nats ({original['items']:,} items).",
            "",
            "| calibrated on | refit | accuracy | answer loss, rise | choice loss, rise |",
            "|---|---|---|---|---|",
        ]
        for refit, kind in ((refit, kind) for refit in (False, True) for kind in kinds):
            here = [row["tasks"][name] for row in points if row["calibration"] == kind and row["refit"] == refit]
            cells = [f"{numbers.mean(found['accuracy'] for found in here):.3f}"]
            for key in ("answer_loss_rise", "choice_loss_rise"):
                error = numbers.mean(found[f"{key}_stderr"] for found in here)
                cells.append(f"{numbers.mean(found[key] for found in here):+.3f} ± {error:.3f}")
            lines.append(f"| {kind} | {'yes' if refit else 'no'} | " + " | ".join(cells) + " |")
        lines.append("")
    names = texts(points)
    lines += [
        "### Texts",
        "",
        "| calibrated on | refit | " + " | ".join(f"extra loss, {Path(n).stem}" for n in names) + " |",
    ]
    lines += ["|---|---|" + "---|" * len(names)]
    for refit, kind in ((refit, kind) for refit in (False, True) for kind in kinds):
        here = [row for row in points if row["calibration"] == kind and row["refit"] == refit]
        cells = [mean([row["extra_loss"][n]["rise"] for row in here]) for n in names]
        lines.append(f"| {kind} | {'yes' if refit else 'no'} | " + " | ".join(cells) + " |")
    return lines


def absorption(rows: list[dict[str, Any]]) -> list[str]:
    """Return what a refit takes away of the error of one layer alone."""
    lines = ["| layer | predicted | no refit | refit | absorbed |", "|---|---|---|---|---|"]
    for row in rows:
        before, after, absorbed = row["no_refit"][0], row["refit"][0], row["absorbed"][0]
        lines.append(f"| {row['layer']} | {row['predicted']:.4f} | {before:.4f} | {after:.4f} | {absorbed:.2f} |")
    return lines


def main() -> None:
    """Write the page."""
    compared, curved, ablated, tried, cost = (read(n) for n in ("compare", "curves", "ablation", "tasks", "cost"))
    lines = ["# Task-aware surgery", "", "Made by `experiments/task_aware/page.py` from the JSON files beside it.", ""]
    lines += [
        "Extra loss is log(perplexity / dense), nats per token; in brackets the range over calibration seeds.",
        "",
    ]
    lines += ["## Every method", "", *comparison(compared["rows"])]
    if curved["rows"]:
        plot_curves(curved["rows"])
        lines += ["## Quality against parameters", "", "![extra loss against parameters](curves.svg)", ""]
    predicted = [row for row in compared["rows"] + curved["rows"] if row["predicted_loss_rise"] is not None]
    if predicted:
        plot_prediction(predicted)
        lines += ["## Predicted against measured", "", "![predicted against measured](prediction.svg)", ""]
    if ablated["rows"]:
        lines += ["## Ablations", "", *noted(ablated), *ablation(ablated["rows"])]
        token_rows = [row for row in ablated["rows"] if row["part"] == "tokens"]
        if token_rows:
            plot_tokens(token_rows)
            lines += ["![extra loss against calibration tokens](tokens.svg)", ""]
    if tried["rows"]:
        lines += ["## Task-awareness", "", *noted(tried), *tasks(tried["rows"]), ""]
    absorbed = read("absorption")["rows"]
    if absorbed:
        lines += ["## What a refit absorbs", "", "One layer operated on at a time, a fifth of it kept; "]
        lines[-1] += f"extra loss on {Path(absorbed[0]['texts'][0]).stem} (development text)."
        lines += ["", *absorption(absorbed), ""]
    if "ratios" in cost:
        lines += ["## Time", "", "| | seconds (median) |", "|---|---|"]
        lines += [f"| {name} | {value:.1f} |" for name, value in cost["seconds"].items()]
        lines += ["", "| ratio (median) | |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in cost["ratios"].items()]
    (FOLDER / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
