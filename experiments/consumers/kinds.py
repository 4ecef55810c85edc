"""The results that the clients are given: each kind at the default settings, from two checkpoints.

    python experiments/consumers/kinds.py FOLDER

makes FOLDER/FAMILY/KIND. What is there already stays, since a directory appears only once it is whole.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {
    "demo": ROOT / "experiments" / "demo" / "checkpoint",
    "second": ROOT / "experiments" / "second_checkpoint" / "checkpoint",
}
#: What is passed to `compress`, all else by default; a fraction of layers becomes their number.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_layers": 5 / 6, "keep": 0},
    "layers": {"target_layers": 2 / 3},
    "parameters": {"target_parameters": 0.8},
    "heads": {"target_kv_cache": 0.75},
    "no_attention": {"target_layers": 5 / 6, "remove": "attention", "keep": 0},
    "no_mlp": {"target_layers": 5 / 6, "remove": "mlp", "keep": 0},
    "bypass": {"target_parameters": 0.8, "components": "bypass"},
}
#: Kinds that are not made by `compress`: the checkpoint itself, and "layers" after `export --dense`.
OTHER_KINDS = ("original", "dense")
TITLES = {
    "layers": "`--target-layers`: low-rank, narrowed",
    "parameters": "`--target-parameters`",
    "heads": "`--target-kv-cache`",
    "no_attention": "attention removed",
    "no_mlp": "MLP removed",
    "bypass": "bypass",
    "plain": "plain",
    "original": "original",
    "dense": "dense export",
}


def options_of(kind: str, original: Path) -> dict[str, Any]:
    """Return what `compress` is given for a kind."""
    options = dict(KINDS[kind])
    if "target_layers" in options:
        layers = json.loads((original / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        options["target_layers"] = round(options["target_layers"] * layers)
    return options


def make(family: str, kind: str, folder: Path) -> Path:
    """Return the directory of a kind, made if it is not there."""
    import layer_surgery

    original, directory = FAMILIES[family], folder / family / kind
    if kind == "original":
        return original
    if not (directory / "config.json").exists():
        if kind == "dense":
            layer_surgery.export_dense(make(family, "layers", folder), directory)
        else:
            options: dict[str, Any] = {"eval_data": None, "continuations": 0, "cache": folder / "statistics"}
            layer_surgery.compress(original, directory, **options, **options_of(kind, original))
    return directory


if __name__ == "__main__":
    for family, kind in itertools.product(FAMILIES, (*KINDS, "dense")):
        print(make(family, kind, Path(sys.argv[1])), flush=True)
