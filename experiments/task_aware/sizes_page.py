"""The page of sizes.py: its tables, the curves of loss against parameters, and maps of what was kept of each layer.

    python experiments/task_aware/sizes_page.py

Reads reports/task_aware/sizes/*.json (one file a checkpoint and seed); writes sizes.md and the figures beside that
folder. Computes means, spreads over seeds and ratios, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics as numbers
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from ways import ALL, EQUAL_BYTES, MIX, MIX_8_BIT, NOTES, QUANTISED, SOME, WAYS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).resolve().parents[2] / "reports" / "task_aware"
#: Colours that the colour-blind can tell apart (Okabe & Ito), markers that tell apart without colour.
STYLES = {
    "removed": ("#BBBBBB", "x", ":"),
    "removed + refit": ("#777777", "x", "--"),
    "Ghosted Layers": ("#777777", "o", ":"),
    "GRASP": ("#000000", "o", ":"),
    "SVD": ("#999933", "s", ":"),
    "SVD-LLM": ("#E69F00", "s", ":"),
    "SVD-LLM, all layers": ("#E69F00", "<", ":"),
    "OBD-LLM": ("#F0E442", "s", ":"),
    "IO-SVD": ("#F0E442", ">", "--"),
    "SliceGPT": ("#CC79A7", "d", ":"),
    "FlattenGPT": ("#CC79A7", "v", "--"),
    "MoDeGPT": ("#CC79A7", "*", "-"),
    "fisher + refit": ("#0072B2", "^", "--"),
    SOME: ("#0072B2", "h", "-"),
    "mix, one width + refit": ("#56B4E9", "D", "-"),
    "mix": ("#009E73", "v", "-"),
    MIX: ("#D55E00", "P", "-"),
}
HEAD = """# Loss against parameters

What each way of making a model smaller costs at the same number of parameters: extra loss (mean loss minus the
original's, nats per token) on text that nothing was tuned on; all ways look at the same calibration tokens. Cells:
mean over calibration seeds ± standard error over windows (paired with the original on the same windows), [least,
most] over seeds. A size in brackets is what the way has where that is more than one hundredth of the original below
the column's; "x" is a size that it cannot reach. GRASP, SVD-LLM and `fisher` operate on as few layers as leave at
most a fifth of each (published methods those with the lowest block influence, `fisher` and `mix, few layers`, which
is the default for a number of layers, those that the scorer `fisher` chooses); `mix` cuts channels and singular
vectors of all layers by one search; `mix, one width` gives all MLPs one width, a plain checkpoint. Peers are re-
implementations: each file in `experiments/task_aware/peers/` says where it differs from its paper. Made by
`experiments/task_aware/sizes.py` and `sizes_page.py`.
"""

Rows = list[dict[str, Any]]


def rises(rows: Rows, text: str) -> list[float]:
    return [row["extra_loss"][text]["rise"] for row in rows]


def cell(rows: Rows, text: str, asked: Any = None) -> str:
    """Return mean, standard error over windows (root mean square over seeds), spread over seeds, and the size."""
    if not any("extra_loss" in row for row in rows):
        return "x" if rows else ""
    rows = [row for row in rows if "extra_loss" in row]
    found = rises(rows, text)
    error = math.sqrt(numbers.mean(row["extra_loss"][text]["stderr"] ** 2 for row in rows))
    spread = f" [{min(found):.3f}, {max(found):.3f}]" if len(found) > 1 else ""
    size = numbers.mean(row["size"] for row in rows)
    smaller = f" ({100 * size:.0f} %)" if isinstance(asked, float) and size < asked - 0.01 else ""
    return f"{numbers.mean(found):.3f} ± {error:.3f}{spread}{smaller}"


def table(corner: str, columns: Iterable[str], lines: Iterable[tuple[str, list[str]]]) -> list[str]:
    """Return a table; lines without any cell are left out."""
    columns = list(columns)
    made = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    made += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in lines if any(cells)]
    return [*made, ""]


def points(rows: Rows, way: str, asked: Any) -> Rows:
    return [row for row in rows if (row["way"], row["asked"]) == (way, asked)]


def loss_tables(rows: Rows, texts: list[str], sizes: list[float]) -> list[str]:
    """Return a table for each text: ways by sizes."""
    lines = []
    for text in texts:
        columns = [f"{100 * size:g} %" for size in sizes]
        cells = ((way, [cell(points(rows, way, size), text, size) for size in sizes]) for way in WAYS)
        lines += [f"**{text}**", "", *table("", columns, cells)]
    predicted = [row for row in rows if row["way"] == "mix" and row.get("predicted_loss_rise") is not None]
    if predicted:
        pairs = [f"{r['predicted_loss_rise']:.4f} and {r['extra_loss'][texts[0]]['rise']:.4f}" for r in predicted]
        lines += [f"Predicted and measured on {texts[0]}, `mix` before its refit: {'; '.join(pairs)}.", ""]
    return lines


def expected_table(rows: Rows, text: str) -> list[str]:
    """Return what was expected after refits beside what was measured, and how often they agree to a quarter."""
    rows = [row for row in rows if row.get("expected") and "extra_loss" in row and isinstance(row["asked"], float)]
    lines, near = [], 0
    for row in sorted(rows, key=lambda row: (row["way"], -row["size"], row["seed"])):
        expected, measured = row["expected"], row["extra_loss"][text]
        near += abs(expected["value"] - measured["rise"]) <= 0.25 * abs(measured["rise"])
        interval = f"{expected['value']:.4f} [{expected['low']:.4f}, {expected['high']:.4f}]"
        cells = [f"{100 * row['size']:.0f} %", str(row["seed"]), interval]
        lines.append((row["way"], [*cells, f"{measured['rise']:.4f} ± {measured['stderr']:.4f}"]))
    if not lines:
        return []
    title = f"**Expected after the refit, and measured on {text}**: within a quarter in {near} of {len(lines)} points"
    return [title, "", *table("", ["size", "seed", "expected", "measured"], lines)]


def bytes_table(rows: Rows, texts: list[str], whole: int) -> list[str]:
    """Return the table of what is quantised, and of what is compared with it at equal bytes, by bytes."""
    names = (*QUANTISED, MIX_8_BIT, *EQUAL_BYTES)
    groups = sorted({(row["way"], str(row["asked"])) for row in rows if row["way"] in names and "bytes" in row})
    lines = []
    for way, asked in groups:
        same = [row for row in rows if (row["way"], str(row["asked"])) == (way, asked) and "bytes" in row]
        taken = numbers.mean(row["bytes"] for row in same)
        size = numbers.mean(row["size"] for row in same)
        cells = [f"{100 * size:.1f} %", f"{taken / 1e6:.2f} MB", f"{100 * taken / whole:.1f} %"]
        lines.append((taken, way, [*cells, *(cell(same, text) for text in texts)]))
    if not lines:
        return []
    columns = ["parameters", "bytes", "of the original", *texts]
    return ["**At equal bytes**", "", *table("", columns, [(way, cells) for _taken, way, cells in sorted(lines)])]


def task_tables(rows: Rows, original: dict[str, Any]) -> list[str]:
    """Return what the tasks say: accuracy, and by how much the log loss of the choice rises, paired by item."""
    rows = [row for row in rows if row.get("tasks")]
    lines = []
    for task, before in original.items():
        columns, found = ["size", "accuracy", "its rise", "log loss of the choice, rise"], []
        for way in ALL:
            for asked in sorted({str(row["asked"]) for row in rows if row["way"] == way}, reverse=True):
                same = [row for row in rows if row["way"] == way and str(row["asked"]) == asked]
                means = {key: numbers.mean(row["tasks"][task][key] for row in same) for key in same[0]["tasks"][task]}
                size = numbers.mean(row["size"] for row in same)
                cells = [f"{100 * size:.0f} %", f"{100 * means['accuracy']:.1f} %"]
                cells.append(f"{100 * means['accuracy_rise']:+.1f} ± {100 * means['accuracy_rise_stderr']:.1f}")
                cells.append(f"{means['choice_loss_rise']:+.3f} ± {means['choice_loss_rise_stderr']:.3f}")
                found.append((way, cells))
        if found:
            title = f"**{task}**: {before['items']} items, the original has {100 * before['accuracy']:.1f} %"
            lines += [title, "", *table("", columns, found)]
    return lines


def speed_table(rows: Rows) -> list[str]:
    """Return tokens a second against the original's, measured in turns."""
    lines = []
    for row in rows:
        if "speed" in row:
            ratios = [
                row["speed"]["result"][f"{name}_tokens_per_second"]
                / row["speed"]["original"][f"{name}_tokens_per_second"]
                for name in ("prefill", "decode")
            ]
            lines.append((row["way"], [f"{100 * row['size']:.0f} %", *(f"{ratio:.2f} x" for ratio in ratios)]))
    columns = ["size", "prefill", "decoding"]
    return ["**Speed, the original's is 1**", "", *table("", columns, lines)] if lines else []


def plot(rows: Rows, texts: list[str], path: Path) -> None:
    """Draw loss against the parameters that each point has, a panel for each text."""
    figure, axes = plt.subplots(1, len(texts), figsize=(6.2 * len(texts), 5.0), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        for way, (colour, marker, line) in STYLES.items():
            measured = [row for row in rows if row["way"] == way and "extra_loss" in row]
            groups = [points(measured, way, asked) for asked in sorted({row["asked"] for row in measured})]
            x = [100 * numbers.mean(row["size"] for row in group) for group in groups]
            y = [rises(group, text) for group in groups]
            if groups:
                means = [numbers.mean(values) for values in y]
                axis.plot(x, means, line, color=colour, marker=marker, label=way, markersize=5, linewidth=1.3)
                axis.vlines(x, [min(values) for values in y], [max(values) for values in y], color=colour, linewidth=1)
        axis.set_yscale("symlog", linthresh=0.01)
        axis.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.invert_xaxis()
        axis.set_xlabel("parameters kept (%)")
        axis.set_ylabel("extra loss (nats per token)")
        axis.set_title(text.removesuffix(".txt"), fontsize=11)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7, ncols=2)
    _save(figure, path)


def plot_time(rows: Rows, text: str, path: Path) -> bool:
    """Draw loss against the time that a generated token takes, the original's being 1; return whether there are any."""
    rows = [row for row in rows if "speed" in row]
    if not rows:
        return False
    figure, axis = plt.subplots(figsize=(6.6, 4.6))
    for way, (colour, marker, line) in STYLES.items():
        found = sorted((decoding_time(row), row["extra_loss"][text]["rise"]) for row in rows if row["way"] == way)
        if found:
            axis.plot(*zip(*found, strict=True), line, color=colour, marker=marker, label=way, linewidth=1.3)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.invert_xaxis()
    axis.set_xlabel("milliseconds of a generated token, the original's = 1")
    axis.set_ylabel(f"extra loss on {text.removesuffix('.txt')} (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)
    return True


def decoding_time(row: dict[str, Any]) -> float:
    """Return the time of a generated token, the original's being 1, measured in turns."""
    speed = row["speed"]
    return float(speed["original"]["decode_tokens_per_second"] / speed["result"]["decode_tokens_per_second"])


def plot_kept(rows: Rows, path: Path) -> bool:
    """Draw which share of each layer's parameters `mix` keeps, a row for each size; return whether there are any."""
    rows = [row for row in rows if row["way"] == MIX and isinstance(row["asked"], float) and row.get("kept")]
    rows = sorted((row for row in rows if row["seed"] == rows[0]["seed"]), key=lambda row: -row["size"])
    if not rows:
        return False
    shares = [[layer["share"] for layer in row["kept"]] for row in rows]
    figure, axis = plt.subplots(figsize=(1.6 + 0.6 * len(shares[0]), 1.1 + 0.5 * len(rows)))
    image = axis.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rows):
        for x, layer in enumerate(row["kept"]):
            ink = "white" if shares[y][x] < 0.55 else "black"
            axis.text(x, y, f"{100 * layer['share']:.0f}", ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(len(shares[0])))
    axis.set_yticks(range(len(rows)), [f"{100 * row['size']:.0f} %" for row in rows])
    axis.set_xlabel("layer")
    axis.set_title(f"`{MIX}`: parameters that stay in each layer (%)", fontsize=10)
    figure.colorbar(image, fraction=0.025)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(path.with_suffix(".png"), dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Write the page and its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the page; the JSON is in sizes/ in it")
    folder = parser.parse_args().folder
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "sizes").glob("*.json"))]
    lines = [HEAD, *(f"* {name}: {note}." for name, note in NOTES.items()), ""]
    for name in dict.fromkeys(report["checkpoint"] for report in reports):
        of_this = [report for report in reports if report["checkpoint"] == name]
        rows = [{**row, "seed": report["seed"]} for report in of_this for row in report["rows"]]
        first, texts = of_this[0], list(of_this[0]["original"])
        sizes = sorted({row["asked"] for row in rows if row["way"] in WAYS and isinstance(row["asked"], float)})[::-1]
        seeds = ", ".join(str(report["seed"]) for report in of_this)
        losses = ", ".join(f"{loss:.3f} on {text}" for text, loss in first["original"].items())
        tokens = {text: first["data"][text]["tokens"] for text in texts}
        lines += [f"## {name}", ""]
        lines += [
            f"{first['parameters']:,} parameters, {first['layers']} layers; the original's loss is {losses}. "
            f"Calibration seeds: {seeds}, {first['data']['calibration']['tokens']:,} tokens each of "
            f"{first['data']['calibration']['name']}. "
            f"Measured on {', '.join(f'{count:,} tokens of {text}' for text, count in tokens.items())}.",
            "",
        ]
        plot(rows, texts, folder / f"sizes_{name}")
        lines += [f"![Loss against parameters](sizes_{name}.png)", "", *loss_tables(rows, texts, sizes)]
        of_more = folder / "expected" / f"{name}.json"  # the same points on more text, so that errors are small
        if of_more.exists():
            report = json.loads(of_more.read_text(encoding="utf-8"))
            lines += expected_table([{**row, "seed": report["seed"]} for row in report["rows"]], texts[0])
        else:
            lines += expected_table(rows, texts[0])
        lines += bytes_table(rows, texts, first["bytes"])
        originals = next((report["original_tasks"] for report in of_this if report["original_tasks"]), {})
        lines += [*task_tables(rows, originals), *speed_table(rows)]
        if plot_time(rows, texts[0], folder / f"sizes_{name}_time"):
            lines += [f"![Loss against the time of a token](sizes_{name}_time.png)", ""]
        if plot_kept(rows, folder / f"sizes_{name}_kept"):
            lines += [f"![Parameters that stay in each layer](sizes_{name}_kept.png)", ""]
    (folder / "sizes.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
