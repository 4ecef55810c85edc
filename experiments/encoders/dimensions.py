"""How much do an embedding model's similarities keep in fewer numbers: our nested map, PCA, or the first numbers?

    python experiments/encoders/dimensions.py MODEL --calibration TEXT --held-out TEXT [--held-out TEXT ...]

MODEL is a directory of sentence-transformers, which must be installed. All maps see the same calibration texts (but
truncation, which sees none) and none sees the held-out ones. At each size, the map made for it and the prefix of one
made for half of the numbers (`nested`) are measured: Spearman's correlation of the similarities of all pairs of
held-out texts with those of the whole vectors, with intervals over texts, and the paired difference to PCA. PCA is as
in sentence-transformers' example of dimensionality reduction: components of centred vectors, stored as a Dense module
without the centre.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common_embedding import passages, sha256, unit_vectors, write_page
from sentence_transformers import SentenceTransformer
from torch import Tensor

from layer_surgery.evaluation.similarities import Agreement, agreement, agreement_change
from layer_surgery.linalg.nested_map import nested_map
from layer_surgery.vectors.storage import prefix

#: Parts of all numbers that are measured.
PARTS = (2, 4, 8, 16)


def main() -> None:
    """Measure all maps on all held-out texts, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, action="append", required=True)
    parser.add_argument("--texts", type=int, default=2000, help="for the maps (default: 2000)")
    parser.add_argument("--measured", type=int, default=400, help="texts of each held-out file (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=Path("reports/encoders/dimensions.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = SentenceTransformer(str(options.model), device="cpu")
    known = unit_vectors(model, passages(options.calibration, options.texts, options.seed))
    maps = all_maps(known)
    rows = []
    for path in options.held_out:
        vectors = unit_vectors(model, passages(path, options.measured, options.seed + 1))
        rows += [{"text": path.name, **row} for row in measured(vectors, maps, options.seed)]
    results = {
        "model_sha256": sha256(options.model / "model.safetensors"),
        "numbers": known.shape[1],
        "seed": options.seed,
        "calibration": {"name": options.calibration.name, "sha256": sha256(options.calibration), "texts": len(known)},
        "held_out": [{"name": path.name, "sha256": sha256(path)} for path in options.held_out],
        "rows": rows,
    }
    write_page(options.report, results, page(results))


def all_maps(vectors: Tensor) -> dict[str, dict[int, Tensor]]:
    """Return the maps [d, D] by method and size."""
    numbers = vectors.shape[1]
    sizes = [numbers // part for part in PARTS]
    whole = torch.eye(numbers, dtype=vectors.dtype)
    components = torch.linalg.svd(vectors - vectors.mean(dim=0), full_matrices=False)[2]
    nested = nested_map(vectors, max(sizes))
    return {
        "ours": {size: nested_map(vectors, size) for size in sizes},
        "ours, nested": {size: nested[:size] for size in sizes},
        "PCA": {size: components[:size] for size in sizes},
        "truncation": {size: whole[:size] for size in sizes},
    }


def measured(vectors: Tensor, maps: dict[str, dict[int, Tensor]], seed: int) -> list[dict[str, Any]]:
    """Return one row for each method and size."""
    theirs = cosines(vectors)
    found: dict[tuple[str, int], Agreement] = {
        (name, size): agreement(cosines(prefix(vectors @ each.T, size)), theirs, seed)
        for name, sized in maps.items()
        for size, each in sized.items()
    }
    rows = []
    for (name, size), each in found.items():
        estimate, change = each.estimate(), agreement_change(found["PCA", size], each)
        rows.append(
            {
                "method": name,
                "numbers": size,
                "spearman": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "minus_pca": [change.value, change.low, change.high],
            }
        )
    return rows


def cosines(vectors: Tensor) -> np.ndarray:
    return (vectors @ vectors.T).numpy()


def page(results: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    lines = [
        "# Fewer numbers a vector",
        "",
        "Made by `experiments/encoders/dimensions.py` from `dimensions.json`. A model of",
        f"{results['numbers']} numbers; maps from {results['calibration']['texts']} texts of",
        f"{results['calibration']['name']}. Spearman's correlation of the similarities of all pairs of held-out texts",
        "with those of the whole vectors, with its 95 % interval over texts; behind it, the difference to PCA, paired.",
    ]
    for text in dict.fromkeys(row["text"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["text"] == text]
        lines += ["", f"## {text}", "", "| numbers | map | Spearman | minus PCA |", "|---|---|---|---|"]
        for row in sorted(rows, key=lambda row: -row["numbers"]):
            value, low, high = row["minus_pca"]
            ours = f"{row['spearman']:.4f} ({row['low']:.4f} to {row['high']:.4f})"
            change = "" if row["method"] == "PCA" else f"{value:+.4f} ({low:+.4f} to {high:+.4f})"
            lines.append(f"| {row['numbers']} | {row['method']} | {ours} | {change} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
