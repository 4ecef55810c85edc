"""What does an embedding model keep at two thirds of its layers, without training, against dropping every third layer?

    python experiments/encoders/compare_embedders.py MODEL [MODEL ...] --calibration TEXT --held-out TEXT ...

MODEL is a directory of sentence-transformers, which must be installed. A seed chooses the passages to calibrate on,
those that are measured, and what is trained on. The rows:

- `dropped`: every third layer is left out (the second, the fifth, ...), as in sentence-transformers' example of layer
  reduction;
- `dropped, trained`: the same, then trained as that example does: mean squared error to the original's vectors, AdamW
  at 1e-4 with a tenth of warm-up, batches of 16, on passages of the calibration text, for as much processor time as the
  longest of our rows took in all. Its settings are the example's and were not searched for;
- `removed, refitted`: `compress(method="remove", refit=True)` at two thirds of the layers, those that `score` ranks
  lowest; the first stays, for in ModernBERT it has no norm before its attention and no other can be in its place;
- `default`: `compress` as it is by default, where a part of each chosen layer is kept (so it has more parameters);
- `default, size of dropped`: the default method over all layers, with the parameters of `dropped`.

Measured are Spearman's correlation of the similarities of all pairs of held-out passages with the original's, nDCG@10
on the bundled sets, both also with the original's documents, and paired differences. One thread. The report is written
after each seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common_embedding import described, parser_of, passages, sha256, unit_vectors, write_page
from sentence_transformers import SentenceTransformer
from torch import nn

import layer_surgery
from layer_surgery.data.retrieval import bundled_retrieval_sets
from layer_surgery.evaluation.embedding import RetrievalVectors, TextVectors, embedding_quality
from layer_surgery.evaluation.similarities import Agreement, agreement, agreement_change

RATE, WARM_UP, BATCH = 1e-4, 0.1, 16


def main() -> None:
    """Make all rows, measure each on every held-out text, and write the report."""
    parser = parser_of(__doc__, texts=1024, report=Path("reports/encoders/compare.json"))
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "calibration": described(options.calibration) | {"texts": options.texts},
        "held_out": [described(path) | {"texts": options.measured} for path in options.held_out],
        "models": [],
    }
    for number, path in enumerate(options.models, start=1):
        original = load(path)
        layers = len(layers_of(original))
        found = {
            "model": number,
            "model_sha256": sha256(path / "model.safetensors"),
            "layers": layers,
            "kept": layers - len(dropped_layers(layers)),
            "parameters": parameters_of(original),
            "seeds": [],
        }
        results["models"].append(found)
        for seed in range(options.seeds):
            rows, agreements = one_seed(path, original, seed, options)
            found["seeds"].append({"seed": seed, "rows": rows, "changes": changes(agreements)})
            write_page(options.report, results, page(results))


def one_seed(
    path: Path, original: SentenceTransformer, seed: int, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, dict[str, Agreement]]]:
    """Make all rows with one choice of passages; return their records, and their correlations by text."""
    known = passages(options.calibration, options.texts, seed)
    held_out = {each.name: passages(each, options.measured, seed + 1) for each in options.held_out}
    measure, layers = Measure(original, held_out, seed), len(layers_of(original))
    gone = len(dropped_layers(layers))
    rows: dict[str, Any] = {}
    agreements: dict[str, dict[str, Agreement]] = {}

    def add(name: str, model: SentenceTransformer, seconds: float, **more: Any) -> None:
        rows[name], agreements[name] = measure(model)
        rows[name] |= {"processor_seconds": round(seconds, 1), **more}
        print(seed, name, rows[name]["parameters"], [each.value for each in agreements[name].values()], flush=True)

    shorter = without_every_third(load(path))
    add("dropped", shorter, 0.0)
    ways: dict[str, dict[str, Any]] = {
        "removed, refitted": {"method": "remove", "refit": True},
        "default": {"target_layers": layers - gone},
        "default, size of dropped": {"target_parameters": rows["dropped"]["parameters"] / parameters_of(original)},
    }
    looks: dict[str, Any] = {"samples": options.texts, "sequence_length": 64, "seed": seed, "device": "cpu"}
    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch) / "calibration.jsonl"
        write_texts(texts, known)
        for name, way in ways.items():
            output, begin = Path(scratch) / name.replace(", ", "-").replace(" ", "-"), time.process_time()
            if way.get("method") == "remove":
                order = layer_surgery.score(str(path), calibration=texts, **looks).removal_order
                way |= {"layers": sorted([each for each in order if each > 0][:gone])}
            layer_surgery.compress(str(path), output, calibration=texts, eval_data=None, **looks, **way)
            add(name, load(output), time.process_time() - begin)
    longest = max(row["processor_seconds"] for row in rows.values())
    more = passages(options.calibration, 20 * options.texts, seed + 2)
    begin = time.process_time()
    steps = train(shorter, original, more, longest, seed)
    add("dropped, trained", shorter, time.process_time() - begin, steps=steps)
    return rows, agreements


class Measure:
    """Measurements of models beside the original, on the same texts."""

    def __init__(self, original: SentenceTransformer, held_out: dict[str, list[str]], seed: int) -> None:
        self._held_out, self._seed, self._sets = held_out, seed, bundled_retrieval_sets()
        self._original = self._vectors(original)

    def __call__(self, model: SentenceTransformer) -> tuple[dict[str, Any], dict[str, Agreement]]:
        """Return the record of a model, and its correlations by text."""
        own = self._vectors(model)
        record = {name: self._quality(own[name], self._original[name]) for name in own}
        found = {
            name: agreement(
                (own[name].texts @ own[name].texts.T).numpy(),
                (self._original[name].texts @ self._original[name].texts.T).numpy(),
                self._seed,
            )
            for name in own
        }
        return {"parameters": parameters_of(model), "quality": record}, found

    def _quality(self, own: TextVectors, original: TextVectors) -> dict[str, Any]:
        """Return what the whole vectors in float32 are worth, as JSON."""
        found = asdict(embedding_quality(own, original, self._sets, [own.dimensions], self._seed))
        names = ("similarity", "ndcg10")
        return {
            **{name: found["points"][0][name] for name in names},
            **{f"{name} beside the original": found["asymmetric"][name] for name in names},
            "original's ndcg10": found["original_ndcg10"],
        }

    def _vectors(self, model: SentenceTransformer) -> dict[str, TextVectors]:
        first = self._sets[0]
        both = RetrievalVectors(*(unit_vectors(model, list(each)) for each in (first.queries, first.documents)))
        retrieval = {each.name: both for each in self._sets}  # the sets differ in what is wanted only
        return {name: TextVectors(unit_vectors(model, texts), retrieval) for name, texts in self._held_out.items()}


def load(path: Path) -> SentenceTransformer:
    """Return a model of sentence-transformers; code beside it is ours."""
    return SentenceTransformer(str(path), device="cpu", trust_remote_code=True)


def parameters_of(model: SentenceTransformer) -> int:
    """Return how many numbers a model has."""
    return sum(each.numel() for each in model.parameters())


def layers_of(model: SentenceTransformer) -> nn.ModuleList:
    """Return the longest list of modules of a model: its layers."""
    return max((each for each in model.modules() if isinstance(each, nn.ModuleList)), key=len)


def dropped_layers(count: int) -> list[int]:
    """Return the second of every three layers."""
    return list(range(1, count, 3))


def without_every_third(model: SentenceTransformer) -> SentenceTransformer:
    """Leave out every third layer, in place. Each layer knows of which type it is."""
    layers = layers_of(model)
    for index in reversed(dropped_layers(len(layers))):
        del layers[index]
    return model


def train(
    student: SentenceTransformer, teacher: SentenceTransformer, texts: list[str], seconds: float, seed: int
) -> int:
    """Train on the squared error to the teacher's vectors for so much processor time; return the steps.

    The teacher's vectors are made in that time too.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    begin, steps = time.process_time(), 0
    student.train()
    while (spent := (time.process_time() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, spent / WARM_UP, (1 - spent) / (1 - WARM_UP))
        rows = torch.randint(len(texts), (BATCH,), generator=generator)
        chosen = [texts[int(row)] for row in rows]
        with torch.no_grad():
            wanted = embed(teacher, chosen)
        loss = nn.functional.mse_loss(embed(student, chosen), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    student.eval()
    return steps


def embed(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    """Return the vectors of texts with their graph."""
    preprocess: Callable[[list[str]], Any] = getattr(model, "preprocess", None) or model.tokenize
    vectors: torch.Tensor = model(preprocess(texts))["sentence_embedding"]
    return vectors


def write_texts(path: Path, texts: list[str]) -> None:
    """Write one text a row."""
    path.write_text("\n".join(json.dumps({"text": each}) for each in texts), encoding="utf-8")


def changes(agreements: dict[str, dict[str, Agreement]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return, by our row, peer and text, the paired difference of correlations with its interval."""
    peers = [name for name in agreements if name.startswith("dropped")]
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in agreements:
        for peer in peers if name not in peers else []:
            for text, own in agreements[name].items():
                change = agreement_change(agreements[peer][text], own)
                found.setdefault(name, {}).setdefault(peer, {})[text] = [change.value, change.low, change.high]
    return found


def page(results: dict[str, Any]) -> str:
    """Return the tables in Markdown."""
    lines = [
        "# Embedding models at two thirds of their layers",
        "",
        "Made by `experiments/encoders/compare_embedders.py` from `compare.json`; its docstring says what the rows",
        "are.",
        "Spearman: of the similarities of all pairs of held-out passages with the original's; beside it, one of each",
        "pair by the original. nDCG@10: bundled sets, queries and documents by the model. All are means over seeds; in",
        "brackets the least and the most of them. Of the differences, each seed has its 95 % interval over passages.",
    ]
    for model in results["models"]:
        lines += ["", f"## Model {model['model']}: {model['kept']} of {model['layers']} layers", ""]
        lines.append(f"{model['parameters']:,} parameters before; SHA-256 {model['model_sha256'][:12]}...")
        for text in (each["name"] for each in results["held_out"]):
            lines += ["", f"### {text}", "", *_table(model, text), "", *_differences(model, text)]
    return "\n".join(lines) + "\n"


def _table(model: dict[str, Any], text: str) -> list[str]:
    lines = ["| row | parameters | processor seconds | Spearman | beside the original | nDCG@10 passage | text |"]
    lines += ["|---|---|---|---|---|---|---|"]
    seeds = model["seeds"]
    for name in seeds[0]["rows"]:
        rows = [each["rows"][name] for each in seeds]
        quality = [row["quality"][text] for row in rows]
        sizes = sorted({row["parameters"] for row in rows})
        parameters = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
        lines.append(
            f"| {name} | {parameters} | {mean(row['processor_seconds'] for row in rows):.0f} "
            f"| {_spread([each['similarity']['value'] for each in quality])} "
            f"| {_spread([each['similarity beside the original']['value'] for each in quality])} "
            f"| {mean(each['ndcg10']['passage']['value'] for each in quality):.3f} "
            f"| {mean(each['ndcg10']['text']['value'] for each in quality):.3f} |"
        )
    original = quality[0]["original's ndcg10"]
    lines.append(
        f"| original | {model['parameters']:,} | | 1 | 1 | {original['passage']['value']:.3f} | "
        f"{original['text']['value']:.3f} |"
    )
    return lines


def _differences(model: dict[str, Any], text: str) -> list[str]:
    lines = ["| row | minus | difference of Spearman, by seed |", "|---|---|---|"]
    for name, peers in model["seeds"][0]["changes"].items():
        for peer in peers:
            found = [each["changes"][name][peer][text] for each in model["seeds"]]
            cells = "; ".join(f"{value:+.4f} ({low:+.4f} to {high:+.4f})" for value, low, high in found)
            lines.append(f"| {name} | {peer} | {cells} |")
    return lines


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    main()
