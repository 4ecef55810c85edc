"""The page of sizes.py: its table, the curves of loss against parameters, and a map of what was kept of each layer.

    python experiments/task_aware/sizes_page.py

Reads reports/task_aware/sizes*.json (one file a checkpoint); writes sizes.md and the figures beside them. Computes
means over seeds and ratios, and nothing else.
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
#: Colours that the colour-blind can tell apart (Okabe & Ito), markers that tell apart without colour.
STYLES = {
    "GRASP": ("#999999", "o", ":"),
    "SVD-LLM": ("#E69F00", "s", ":"),
    "fisher + refit": ("#0072B2", "^", "--"),
    "mix, one width + refit": ("#56B4E9", "D", "-"),
    "mix": ("#009E73", "v", "-"),
    "mix + refit": ("#D55E00", "P", "-"),
}
HEAD = """# Loss against parameters

What each way of making a model smaller costs at the same number of parameters: extra loss (mean loss minus the
original's, nats per token) on text that nothing was tuned on. GRASP, SVD-LLM and `fisher` operate on as few layers as
leave at most a fifth of each (published methods those with the lowest block influence, `fisher` those that its scorer
chooses); `mix` cuts channels and singular vectors of all layers by one search; `mix, one width` gives all MLPs one
width, a plain checkpoint. Cells are means over calibration seeds, in brackets their range; after the slash, the share
of GRASP's. Standard errors over windows are in the JSON. Made by `experiments/task_aware/sizes.py` and
`sizes_page.py`.
"""


def rises(rows: list[dict[str, Any]], way: str, size: float, text: str) -> list[float]:
    return [row["extra_loss"][text]["rise"] for row in rows if (row["way"], row["size"]) == (way, size)]


def cell(found: list[float], published: list[float]) -> str:
    if not found:
        return ""
    spread = f" [{min(found):.3f}, {max(found):.3f}]" if len(found) > 1 else ""
    share = f" / {numbers.mean(found) / numbers.mean(published):.2f}" if published else ""
    return f"{numbers.mean(found):.3f}{spread}{share}"


def tables(report: dict[str, Any]) -> list[str]:
    """Return a table for each text: ways by sizes."""
    rows = report["rows"]
    sizes = sorted({row["size"] for row in rows}, reverse=True)
    lines = []
    for text in rows[0]["extra_loss"]:
        lines += [f"**{text}**", "", "| | " + " | ".join(f"{100 * size:g} %" for size in sizes) + " |"]
        lines.append("|---" * (len(sizes) + 1) + "|")
        for way in STYLES:
            cells = [cell(rises(rows, way, size, text), rises(rows, "GRASP", size, text)) for size in sizes]
            if any(cells):
                lines.append(f"| {way} | " + " | ".join(cells) + " |")
        lines.append("")
    predicted = [row for row in rows if row["way"] == "mix" and row["predicted_loss_rise"]]
    if predicted:
        text = next(iter(rows[0]["extra_loss"]))
        pairs = [f"{r['predicted_loss_rise']:.4f} and {r['extra_loss'][text]['rise']:.4f}" for r in predicted]
        lines += [f"Predicted and measured on {text}, `mix` before its refit: {'; '.join(pairs)}.", ""]
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw loss against parameters, a panel for each text."""
    rows = report["rows"]
    names = list(rows[0]["extra_loss"])
    figure, axes = plt.subplots(1, len(names), figsize=(5.6 * len(names), 4.4), squeeze=False)
    for axis, text in zip(axes[0], names, strict=True):
        for way, (colour, marker, line) in STYLES.items():
            sizes = sorted({row["size"] for row in rows if row["way"] == way}, reverse=True)
            means = [numbers.mean(rises(rows, way, size, text)) for size in sizes]
            axis.plot([100 * size for size in sizes], means, line, color=colour, marker=marker, label=way)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.invert_xaxis()
        axis.set_xlabel("parameters kept (%)")
        axis.set_ylabel("extra loss (nats per token)")
        axis.set_title(text.removesuffix(".txt"), fontsize=11)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=9)
    _save(figure, path)


def plot_kept(report: dict[str, Any], path: Path) -> None:
    """Draw what `mix` kept of each layer's MLP, a row for each size: channels as a share of the widest."""
    rows = [row for row in report["rows"] if row["way"] == "mix + refit" and row["seed"] == report["rows"][0]["seed"]]
    rows.sort(key=lambda row: -row["size"])
    widest = max(layer.get("channels", 0) for row in rows for layer in row["plan"])
    shares = [[min(1.0, layer.get("channels", widest) / widest) for layer in row["plan"]] for row in rows]
    figure, axis = plt.subplots(figsize=(1.2 + 0.55 * len(shares[0]), 1.0 + 0.5 * len(rows)))
    image = axis.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rows):
        for x, layer in enumerate(row["plan"]):
            ink = "white" if shares[y][x] < 0.55 else "black"
            axis.text(x, y, str(layer.get("channels", "all")), ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(len(shares[0])))
    axis.set_yticks(range(len(rows)), [f"{100 * row['size']:g} %" for row in rows])
    axis.set_xlabel("layer")
    axis.set_title("channels that stay in each MLP (of the most that any keeps)", fontsize=10)
    figure.colorbar(image, fraction=0.025)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(path.with_suffix(".png"), dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Write the page and its figures."""
    lines = [HEAD]
    for file in sorted(FOLDER.glob("sizes*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        seeds = sorted({row["seed"] for row in report["rows"]})
        plot(report, FOLDER / file.stem)
        plot_kept(report, FOLDER / f"{file.stem}_kept")
        lines += [f"## {report['checkpoint']}", "", f"Calibration seeds: {', '.join(map(str, seeds))}.", ""]
        lines += [f"![Loss against parameters]({file.stem}.png)", "", *tables(report)]
        lines += [f"![Channels kept of each layer]({file.stem}_kept.png)", ""]
    (FOLDER / "sizes.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
