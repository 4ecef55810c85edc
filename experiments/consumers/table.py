"""What works for which kind of result: every cell is one tool doing its work on a saved directory.

    python experiments/consumers/table.py [--only CHECK ...] [--compile-backend inductor]

The directories are made from the demo checkpoint by this package; the tools load them with transformers alone. The
checks are those of tests/consumer_checks.py. Writes reports/consumers/table.json and table.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
import transformers.dynamic_module_utils
from common import DEMO_CHECKPOINT, ROOT, write_report
from consumer_checks import CHECKS, Check, Subject, make_subjects

KINDS = {
    "original": "the demo checkpoint itself",
    "plain": "two of its layers removed outright",
    "low_rank": "two of its layers low-rank (30 % of their parameters), the first one among them",
    "no_attention": "the attention of two of its layers removed, that of the first among them",
    "narrowed": "85 % of its parameters kept, channels and singular vectors of all layers cut by one search",
    "dense": "the low-rank one after `layer-surgery export --dense`",
}
TITLES = {"no_attention": "attention removed", "low_rank": "low-rank", "dense": "dense export"}
#: Versions that matter here beside those of every report.
PACKAGES = ("accelerate", "peft", "lm-eval", "torchao")


def measure(check: Check, kind: str, directory: Path, scratch: Path, backend: str) -> dict[str, Any]:
    """Run one check; a failure stays in its cell, with the first line of its message."""
    if check.factors_only and kind != "low_rank":
        return {"result": "-"}
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(dir=scratch) as own:
            check.function(Subject(directory, Path(own), compile_backend=backend))
        cell: dict[str, Any] = {"result": "yes"}
    except Exception as error:  # the reason is the result
        lines = str(error).strip().splitlines() or [""]
        cell = {"result": "no", "error": f"{type(error).__name__}: {lines[0][:300]}"}
    return cell | {"seconds": round(time.perf_counter() - start, 1)}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def page(rows: dict[str, dict[str, Any]], packages: dict[str, str], backend: str) -> str:
    """Return the table as Markdown, failures with their reasons below it."""
    lines = [
        "# Consumers",
        "",
        "Made by `experiments/consumers/table.py` together with `table.json`; no cell by hand. One directory of each",
        "kind, made from the demo checkpoint (Llama type, 12 layers), is loaded by each tool and used; results are",
        "compared with those of the same directory without the tool, in float32. `tests/consumer_checks.py` says what",
        "exactly is done; the tests run the same checks on tiny random models.",
        "",
        *[f"- {TITLES.get(name, name)}: {text}" for name, text in KINDS.items()],
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in packages.items()) + "; others in `table.json`.",
        f"Backend of `torch.compile`: {backend}.",
        "",
        "| | " + " | ".join(TITLES.get(kind, kind) for kind in KINDS) + " |",
        "|---" * (len(KINDS) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = ["**no**" if row[kind]["result"] == "no" else row[kind]["result"] for kind in KINDS]
        lines.append(f"| {CHECKS[name].title} | " + " | ".join(cells) + " |")
    failed = [(name, kind) for name, row in rows.items() for kind in KINDS if row[kind]["result"] == "no"]
    for name, kind in failed:
        lines += ["", f"- {CHECKS[name].title}, {TITLES.get(kind, kind)}: {rows[name][kind]['error']}"]
    lines += ["", "A dash: there are no factors to train. Not measured: vLLM itself, GPUs, ONNX, 4-bit weights."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), metavar="CHECK", help="default: all")
    parser.add_argument("--compile-backend", default="aot_eager", help="inductor takes minutes on a CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "reports" / "consumers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        transformers.dynamic_module_utils.HF_MODULES_CACHE = str(scratch / "modules")
        directories = make_subjects(DEMO_CHECKPOINT, scratch, first=0, second=7)
        rows: dict[str, dict[str, Any]] = {}
        for name in options.only or CHECKS:
            rows[name] = {
                kind: measure(CHECKS[name], kind, directories[kind], scratch, options.compile_backend) for kind in KINDS
            }
            print(name, *(f"{kind}: {cell['result']}" for kind, cell in rows[name].items()), sep="  ", flush=True)
    packages = {name: version(name) for name in PACKAGES}
    results = {"kinds": KINDS, "packages": packages, "compile_backend": options.compile_backend, "rows": rows}
    write_report(options.output / "table.json", results)
    (options.output / "table.md").write_text(page(rows, packages, options.compile_backend), encoding="utf-8")


if __name__ == "__main__":
    main()
