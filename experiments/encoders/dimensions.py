"""How much do an embedding model's similarities keep in fewer numbers: our nested map, PCA, or the first numbers?

    python experiments/encoders/dimensions.py MODEL [MODEL ...] --calibration TEXT --held-out TEXT [--held-out TEXT ...]

MODEL is a directory of sentence-transformers, which must be installed. All maps see the same calibration texts (but
truncation, which sees none) and none sees the held-out ones. For each of the seeds, all texts are drawn anew. At each
size, the map made for it and the prefix of one made for half of the numbers (`nested`) are measured: Spearman's
correlation of the similarities of all pairs of held-out texts with those of the whole vectors, with intervals over
texts, and the paired difference to the better of two decompositions:

- `PCA`: components of centred vectors, stored as a Dense module without the centre, as in sentence-transformers'
  example of dimensionality reduction;
- `SVD`: singular vectors of the vectors as they are, which is PCA without centring.

The last is the stronger peer at few numbers; which of the two is better is decided by the measured figures themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from common_embedding import described, parser_of, passages, sha256, unit_vectors, write_page
from sentence_transformers import SentenceTransformer
from torch import Tensor

from layer_surgery.evaluation.similarities import Agreement, agreement, agreement_change
from layer_surgery.linalg.nested_map import NestedMap, nested_map
from layer_surgery.vectors.storage import prefix

#: Parts of all numbers that are measured.
PARTS = (2, 4, 8, 16)
PEERS = ("PCA", "SVD")


def main() -> None:
    """Measure all maps of all models on all held-out texts, and write the report."""
    parser = parser_of(__doc__, texts=2000, report=Path("reports/encoders/dimensions.json"))
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=3, help="of the texts (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "models": [],
        "seeds": options.seeds,
        "calibration": described(options.calibration) | {"texts": options.texts},
        "held_out": [described(path) | {"texts": options.measured} for path in options.held_out],
        "rows": [],
    }
    for number, path in enumerate(options.models, start=1):
        model = SentenceTransformer(str(path), device="cpu")
        results["models"].append({"model": number, "sha256": sha256(path / "model.safetensors")})
        for seed in range(options.seeds):
            # Seeds of calibration are even and those of measurement odd, so no two draws are the same.
            known = unit_vectors(model, passages(options.calibration, options.texts, 2 * seed))
            maps = all_maps(known)
            results["models"][-1]["numbers"] = known.shape[1]
            for text in options.held_out:
                vectors = unit_vectors(model, passages(text, options.measured, 2 * seed + 1))
                found = measured(vectors, maps, seed)
                results["rows"] += [{"model": number, "seed": seed, "text": text.name, **row} for row in found]
            write_page(options.report, results, page(results))


def all_maps(vectors: Tensor) -> dict[str, dict[int, NestedMap]]:
    """Return the maps by method and size."""
    numbers = vectors.shape[1]
    sizes = [numbers // part for part in PARTS]
    nothing = vectors.new_zeros(numbers)
    weights = {
        "PCA": torch.linalg.svd(vectors - vectors.mean(dim=0), full_matrices=False)[2],
        "SVD": torch.linalg.svd(vectors, full_matrices=False)[2],
        "truncation": torch.eye(numbers, dtype=vectors.dtype),
    }
    nested = nested_map(vectors, max(sizes))
    return {
        "ours": {size: nested_map(vectors, size) for size in sizes},
        "ours, nested": {size: nested.prefix(size) for size in sizes},
        **{name: {size: NestedMap(each, nothing).prefix(size) for size in sizes} for name, each in weights.items()},
    }


def measured(vectors: Tensor, maps: dict[str, dict[int, NestedMap]], seed: int) -> list[dict[str, Any]]:
    """Return one row for each method and size."""
    theirs = cosines(vectors)
    found: dict[tuple[str, int], Agreement] = {
        (name, size): agreement(cosines(prefix(each(vectors), size)), theirs, seed)
        for name, sized in maps.items()
        for size, each in sized.items()
    }
    rows = []
    for (name, size), each in found.items():
        estimate = each.estimate()
        peer = max(PEERS, key=lambda peer: found[peer, size].estimate().value)
        change = agreement_change(found[peer, size], each)
        rows.append(
            {
                "method": name,
                "numbers": size,
                "spearman": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "better_peer": peer,
                "minus_better_peer": [change.value, change.low, change.high],
            }
        )
    return rows


def cosines(vectors: Tensor) -> np.ndarray:
    return (vectors @ vectors.T).numpy()


def page(results: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    numbers = ", ".join(str(each["numbers"]) for each in results["models"])
    lines = [
        "# Fewer numbers a vector",
        "",
        "Made by `experiments/encoders/dimensions.py` from `dimensions.json`; its docstring says what the rows are.",
        f"Models of {numbers} numbers; maps from {results['calibration']['texts']:,} passages of",
        f"{results['calibration']['name']}; {results['held_out'][0]['texts']:,} passages of each held-out text; all",
        f"are drawn anew for each of {results['seeds']} seeds. Spearman's correlation of the similarities of all",
        "pairs of held-out passages with those of the whole vectors: mean over seeds. Behind it, the paired difference",
        "to the better of PCA and SVD for each seed, with its 95 % interval over passages.",
    ]
    rows = results["rows"]
    for model in (each["model"] for each in results["models"]):
        for text in dict.fromkeys(row["text"] for row in rows):
            lines += [
                "",
                f"## Model {model}, {text}",
                "",
                "| numbers | map | Spearman | minus the better peer, by seed |",
            ]
            lines += ["|---|---|---|---|"]
            here = [row for row in rows if row["model"] == model and row["text"] == text]
            for size in sorted({row["numbers"] for row in here}, reverse=True):
                for method in dict.fromkeys(row["method"] for row in here):
                    seeds = [row for row in here if row["numbers"] == size and row["method"] == method]
                    mean = np.mean([row["spearman"] for row in seeds])
                    changes = ", ".join(_change(row) for row in seeds if method not in PEERS)
                    lines.append(f"| {size} | {method} | {mean:.4f} | {changes} |")
    return "\n".join(lines) + "\n"


def _change(row: dict[str, Any]) -> str:
    value, low, high = row["minus_better_peer"]
    return f"{value:+.4f} ({low:+.4f} to {high:+.4f})"


if __name__ == "__main__":
    main()
