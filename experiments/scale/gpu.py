"""One command for a machine with a GPU, under 25 minutes: is it right there, how fast is it, and what does it give?

    python experiments/scale/gpu.py WORK_DIR --text FILE [--device cuda] [--minutes 8] [--steps right shape quality]

1. `right`: the demo checkpoint is compressed on the CPU and on the device, both in float32. The plans must have the
   same layers, and every loss, before and after, must be within 1e-3 nats.
2. `shape`: a random Llama-7B (or --layers of it) is compressed from disk to disk: seconds of every stage, seconds to
   read and write the same bytes and nothing else, peak memory of process and device, and what `--dry-run` had said.
3. `quality`: a Llama of 100 M parameters is trained on nine tenths of FILE, and then compressed by several methods to
   several sizes, calibrated on one twentieth and measured on the last.

`--device cpu --small` runs the same code with tiny sizes, which says nothing but that it runs. The report is written
after every step; a step that failed is in it with its error, and the others are made all the same.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import make_checkpoint
from shapes import configuration
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

import layer_surgery
from layer_surgery.devices import peak_memory_bytes

LENGTH = 256
BATCH = 64  #: Sequences in a step of training.
METHODS = ("remove", "svd", "grasp", "svd_llm", "fisher", "mix")


def losses(report: layer_surgery.SurgeryReport) -> list[float]:
    """Return the losses before and after, in nats per token."""
    return [math.log(next(iter(each.perplexity.values())).value) for each in (report.before, report.after)]


def right(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare the demo checkpoint's compression on the device with that on the CPU."""
    options: dict[str, Any] = {"target_layers": 9, "dtype": "float32", "continuations": 0, "no_save": True}
    options |= {"samples": 8, "sequence_length": 64, "eval_windows": 4} if arguments.small else {}
    found = {}
    for device in ("cpu", arguments.device):
        report = layer_surgery.compress(DEMO_CHECKPOINT, device=device, **options)
        found[device] = {
            "layers": [layer.index for layer in report.plan.operated],
            "ranks": [layer.ranks for layer in report.plan.layers],
            "losses": losses(report),
            "seconds": report.timings,
        }
    cpu, device = found["cpu"], found[arguments.device]
    differences = [abs(a - b) for a, b in zip(cpu["losses"], device["losses"], strict=True)]
    return {
        **found,
        "same layers": cpu["layers"] == device["layers"],
        "same ranks": cpu["ranks"] == device["ranks"],
        "largest difference of a loss": max(differences),
        "within 1e-3": max(differences) <= 1e-3,
    }


def shape(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress a random 7B from disk to disk."""
    layers = 2 if arguments.small else arguments.layers
    checkpoint, output = arguments.work_dir / "7b", arguments.work_dir / "7b-smaller"
    shutil.rmtree(checkpoint, ignore_errors=True)
    size = make_checkpoint(checkpoint, configuration("llama-7b", layers, 32 if arguments.small else 1))
    options: dict[str, Any] = {"target_parameters": 0.8, "device": arguments.device, "continuations": 0}
    options |= {"samples": 8, "sequence_length": 64} if arguments.small else {}
    options |= {"eval_windows": 8}
    foreseen = layer_surgery.foresee(checkpoint, output, **options)
    copying = time.perf_counter()
    for file in checkpoint.glob("*.safetensors"):
        shutil.copyfile(file, arguments.work_dir / "copied.safetensors")
    copying = time.perf_counter() - copying
    start = time.perf_counter()
    report = layer_surgery.compress(checkpoint, output, overwrite=True, **options)
    seconds = time.perf_counter() - start
    found = {
        "layers": layers,
        "checkpoint_bytes": size,
        "seconds": round(seconds, 2),
        "seconds of copying the checkpoint": round(copying, 2),
        "stages": report.timings,
        "foreseen": foreseen.to_dict(),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_device_memory_bytes": report.peak_device_memory_bytes,
    }
    for path in (checkpoint, output):
        shutil.rmtree(path)
    (arguments.work_dir / "copied.safetensors").unlink()
    return found


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a model on the text, and compress it by every method."""
    parts = _parts(arguments)
    checkpoint = arguments.work_dir / "trained"
    training = train(parts["train"], checkpoint, arguments)
    depth = training["layers"]
    options: dict[str, Any] = {"samples": 8, "sequence_length": 64, "eval_windows": 4} if arguments.small else {}
    report = layer_surgery.sweep(
        checkpoint,
        arguments.work_dir / "sweep",
        target_layers=[depth - 1] if arguments.small else [depth - 1, depth - 2, depth - 3],
        keep=[0.2],
        method=list(METHODS),
        calibration=[str(parts["calibration"])],
        eval_data=[str(parts["held out"])],
        device=arguments.device,
        overwrite=True,
        **options,
    )
    rows = [
        {
            **{name: getattr(point, name) for name in ("target_layers", "keep", "method", "refit", "status", "error")},
            "parameters": point.parameters,
            "extra loss": None if point.perplexity_ratio is None else math.log(point.perplexity_ratio),
            "seconds": point.seconds,
        }
        for point in report.points
    ]
    shutil.rmtree(arguments.work_dir / "sweep")
    data = json.dumps({"calibration": report.calibration, "held out": report.evaluation})
    data = data.replace(f"{arguments.work_dir}/", "")  # no folder of this machine
    return {"training": training, "data": json.loads(data), "rows": rows}


def _parts(arguments: argparse.Namespace) -> dict[str, Path]:
    """Write the parts of the text, none of which holds anything of another."""
    text = arguments.text.read_text(encoding="utf-8")
    cuts = {"train": (0.0, 0.9), "calibration": (0.9, 0.95), "held out": (0.95, 1.0)}
    paths = {}
    for name, (start, end) in cuts.items():
        paths[name] = arguments.work_dir / f"{name.replace(' ', '-')}.txt"
        paths[name].write_text(text[int(start * len(text)) : int(end * len(text))], encoding="utf-8")
    return paths


def train(text: Path, output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a Llama for some minutes and save it; its learning rate follows the clock: up for a fiftieth, then down."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 2}
    if not arguments.small:
        sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12}
    config = LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=1024, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(arguments.device)
    batch = 4 if arguments.small else BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    length, seconds = min(LENGTH, len(ids) - 1), 60 * arguments.minutes
    generator, start, steps, loss = torch.Generator().manual_seed(0), time.perf_counter(), 0, math.nan
    while (gone := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(gone / 0.02 + 1e-2, 1.0, (1 - gone) / 0.5)
        starts = torch.randint(len(ids) - length, (batch,), generator=generator)
        rows = torch.stack([ids[first : first + length] for first in starts.tolist()]).to(arguments.device)
        with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
            found = model(input_ids=rows, labels=rows).loss
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps, loss = steps + 1, float(found.detach())
    model.to("cpu", torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    return {
        "layers": config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": steps * batch * length,
        "steps": steps,
        "last loss": loss,
        "minutes": arguments.minutes,
    }


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"right": right, "shape": shape, "quality": quality}


def main() -> None:
    """Make the steps in turn, and write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="plain text to train on, some MB at least")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--layers", type=int, default=32, help="of the 7B shape (default: 32)")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training (default: 8)")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "scale" / "gpu.json")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"small": arguments.small, "steps": {}}
    for name in arguments.steps:
        start = time.perf_counter()
        try:
            result = STEPS[name](arguments)
        except Exception as error:  # what a machine is lent for is not lost by one step
            result = {"failed": f"{type(error).__name__}: {error}"}
        found["steps"][name] = result | {"minutes in all": round((time.perf_counter() - start) / 60, 2)}
        print(name, json.dumps(found["steps"][name], indent=1), flush=True)
        write_report(arguments.report, found, arguments.device)
    if any("failed" in step for step in found["steps"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
