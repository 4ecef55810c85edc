"""Seconds and peak memory of every stage on random checkpoints of real shapes, from disk to disk.

    python experiments/scale/shapes.py WORK_DIR [--shapes llama-7b llama-3-8b llama-70b mixtral-8x7b] [--layers 2]
        [--dtypes bfloat16 float32] [--samples 32] [--operate 1] [--no-refit] [--scale 1]

Each shape is written shard by shard with some of its layers, and compressed by a process of its own with the default
method and its refit (`--target-parameters 0.8`); perplexity is measured before and after. Beside what the run says of
each stage stands what `--dry-run` said of it. Memory is the peak resident memory of the process, as the kernel reports
it. What depends on the number of layers is a straight line in it, so the seconds of the whole depth are extrapolated:
from those of one layer, and of embeddings and head once. The report is written after every run, and runs that it has
are not made again; `--scale 16` divides all widths, to try the script. Where all layers take too long, `--operate 1`
makes low-rank the last only (a fifth of it stays, `--method fisher`), and the others pass whole; `--no-refit` leaves
the refit out. Decompositions do not depend on the tokens, so few `--samples` change the seconds of the passes only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from random_checkpoint import make_checkpoint
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, write_report

#: Type, hidden size, MLP, heads, heads of keys and values, vocabulary, layers of the whole model.
SHAPES: dict[str, tuple[type[PreTrainedConfig], int, int, int, int, int, int]] = {
    "llama-7b": (LlamaConfig, 4096, 11008, 32, 32, 32000, 32),
    "llama-3-8b": (LlamaConfig, 4096, 14336, 32, 8, 128256, 32),
    "llama-70b": (LlamaConfig, 8192, 28672, 64, 8, 32000, 80),
    "mixtral-8x7b": (MixtralConfig, 4096, 14336, 32, 8, 32000, 32),
}
LENGTH = 256
#: Stages of which a part does not depend on the number of layers: the head, and Python and libraries that start.
STAGES = ("evaluate_before", "score", "operate", "refit", "evaluate_after", "save")


def configuration(shape: str, layers: int, scale: int) -> PreTrainedConfig:
    """Return the configuration of a shape with so many layers, its widths divided by `scale`."""
    kind, hidden, width, heads, kv_heads, vocabulary, _depth = SHAPES[shape]
    heads, kv_heads = max(1, heads // scale), max(1, kv_heads // scale)
    # The demo's tokenizer has ids below 4,096; the widths are what takes time.
    return kind(
        hidden_size=hidden // scale,
        intermediate_size=width // scale,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=max(4096, vocabulary // scale),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def run(arguments: list[str]) -> tuple[dict[str, Any], int]:
    """Run a command; return its JSON and the peak resident bytes of its process."""
    command = [sys.executable, "-m", "layer_surgery", "compress", *arguments, "--json", "--quiet"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    ) as process:
        assert process.stdout is not None
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    return json.loads(text), usage.ru_maxrss * 1024


def measured(shape: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint if it is not there, compress it, and return what each stage took."""
    name = f"{shape}-{arguments.layers}-{arguments.scale}"
    checkpoint, output = arguments.work_dir / name, arguments.work_dir / f"{name}-out"
    if not (checkpoint / "config.json").exists():
        shutil.rmtree(checkpoint, ignore_errors=True)
        make_checkpoint(checkpoint, configuration(shape, arguments.layers, arguments.scale))
    options = [str(checkpoint), "--output", str(output), "--overwrite", "--dtype", dtype, "--device", arguments.device]
    if arguments.operate:
        last = range(arguments.layers - arguments.operate, arguments.layers)
        options += ["--layers", ",".join(map(str, last)), "--method", "fisher", "--keep", "0.2"]
    else:
        options += ["--target-parameters", "0.8"]
    options += ["--no-refit"] if arguments.no_refit else []
    options += ["--samples", str(arguments.samples), "--sequence-length", str(LENGTH)]
    options += ["--eval-windows", "8", "--continuations", "0", "--decomposition", arguments.decomposition]
    options += ["--memory-limit", arguments.memory_limit] if arguments.memory_limit else []
    foreseen, _ = run([*options, "--dry-run"])
    start = time.perf_counter()
    report, peak = run(options)
    seconds = time.perf_counter() - start
    expected = {stage["name"]: stage for stage in foreseen["stages"]}
    stages = {
        stage: {"seconds": taken, "foreseen": round(expected[stage]["seconds"] or 0.0, 2)}
        for stage in STAGES
        if (taken := report["timings"].get(stage)) is not None and stage in expected
    }
    depth = SHAPES[shape][-1]
    layers = sum(stages[stage]["seconds"] for stage in ("score", "operate", "refit") if stage in stages)
    rest, operated = seconds - layers, arguments.operate or arguments.layers
    missing = " without the refit" if arguments.no_refit else " and refit"
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    shutil.rmtree(output)
    return {
        "shape": shape,
        "dtype": dtype,
        "layers": arguments.layers,
        "scale": arguments.scale,
        "samples": arguments.samples,
        "operate": arguments.operate,
        "no_refit": arguments.no_refit,
        "checkpoint_bytes": size,
        "stages": stages,
        "seconds": round(seconds, 1),
        "seconds_a_layer": round(layers / operated, 2),
        "peak_resident_bytes": peak,
        "peak_foreseen_bytes": foreseen["memory_bytes"],
        "perplexity": [next(iter(report[when]["perplexity"].values()))["value"] for when in ("before", "after")],
        "extrapolated": (
            f"{depth} layers would take about {(layers / operated * depth + rest) / 60:.0f} minutes: "
            f"{layers / operated:.1f} s a layer for statistics, surgery{missing} of {arguments.samples} x {LENGTH} "
            f"tokens, measured on {operated}, and {rest:.0f} s for the rest, which grows too, where perplexity passes "
            "more layers; "
            "memory grows with the depth by the hidden states that are kept, up to 512 MiB, and not by weights."
        ),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = ["# Real shapes, from disk to disk", ""]
    lines += [
        "Random weights; `experiments/scale/shapes.py`. Seconds of stages; memory is the peak of the process.",
        "",
    ]
    lines += [f"| shape | dtype | layers | {' | '.join(STAGES)} | a layer | peak GB | foreseen GB |"]
    lines += ["|---|---|--:|" + "--:|" * (len(STAGES) + 3)]
    for row in rows:
        cells = [f"{row['stages'][stage]['seconds']:.1f}" if stage in row["stages"] else "" for stage in STAGES]
        shape = row["shape"] if row["scale"] == 1 else f"{row['shape']}, widths / {row['scale']}"
        memory = [f"{row[key] / 1e9:.2f}" for key in ("peak_resident_bytes", "peak_foreseen_bytes")]
        cells = [shape, row["dtype"], str(row["layers"]), *cells, f"{row['seconds_a_layer']:.1f}", *memory]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {row['shape']}, {row['dtype']}: {row['extrapolated']}" for row in rows)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make every run that the report does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--operate", type=int, default=0, help="only so many layers, the last; 0 for all")
    parser.add_argument("--no-refit", action="store_true")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--decomposition", default="auto")
    parser.add_argument("--memory-limit")
    parser.add_argument("--keep-checkpoints", action="store_true")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "scale" / "shapes.json")
    arguments = parser.parse_args()
    known = json.loads(arguments.report.read_text(encoding="utf-8"))["rows"] if arguments.report.exists() else []
    rows: list[dict[str, Any]] = list(known)
    same = ("layers", "scale", "samples", "operate", "no_refit")
    for shape in arguments.shapes:
        for dtype in arguments.dtypes:
            wanted = {"shape": shape, "dtype": dtype} | {name: getattr(arguments, name) for name in same}
            if any(wanted.items() <= row.items() for row in rows):
                continue
            rows.append(measured(shape, dtype, arguments))
            print(json.dumps(rows[-1], indent=1), flush=True)
            write_report(arguments.report, {"rows": rows})
            arguments.report.with_suffix(".md").write_text(table(rows), encoding="utf-8")
        if not arguments.keep_checkpoints:
            shutil.rmtree(arguments.work_dir / f"{shape}-{arguments.layers}-{arguments.scale}", ignore_errors=True)


if __name__ == "__main__":
    main()
