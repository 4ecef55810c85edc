"""Is memory bounded? Peak resident memory of `layer-surgery compress` on random Llama checkpoints of growing depth.

    python experiments/main_job/memory.py WORK_DIR [--depths 11 22 44] [--dtype auto]

Shapes: hidden 2048, MLP 5632, 32 heads / 4 KV heads, vocabulary 32000, bf16, untied; 16 calibration sequences of 512
tokens. Two layers are operated on with GRASP (boundaries of every layer are kept, and gradients taken), and perplexity
is measured before and after. Each run is a process of its own; its peak resident memory is what the kernel reports.
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

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.checkpoint.save import StreamedSafetensors, split_shards
from layer_surgery.checkpoint.tensors import INDEX_FILE, TensorSpec

SHARD_BYTES = 1_000_000_000


def make_checkpoint(directory: Path, depth: int) -> int:
    """Write a random checkpoint, shard by shard, with the demo's tokenizer; return its bytes of tensors."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_hidden_layers=depth,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    specs = {name: TensorSpec(tuple(t.shape), torch.bfloat16) for name, t in model.state_dict().items()}
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(depth)
    shards = split_shards(specs, SHARD_BYTES)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with StreamedSafetensors(directory / file_name, {name: specs[name] for name in shard}) as file:
            for name in shard:
                shape = specs[name].shape
                tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.02
                file.write(name, tensor.to(torch.bfloat16))
                weight_map[name] = file_name
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CHECKPOINT / name, directory)
    return total


def measure(command: list[str], output: Path) -> tuple[int, float]:
    """Run a command and return the peak resident bytes of its process and its seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"failed: {' '.join(command)}")
    shutil.rmtree(output)
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def main() -> None:
    """Measure every depth and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[11, 22, 44])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "main_job" / "memory.json")
    arguments = parser.parse_args()
    rows = []
    for depth in arguments.depths:
        checkpoint, output = arguments.work_dir / f"random-{depth}", arguments.work_dir / f"out-{depth}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        size = make_checkpoint(checkpoint, depth)
        command = [
            *(sys.executable, "-m", "layer_surgery", "compress", str(checkpoint), "--output", str(output)),
            *("--target-layers", str(depth - 2), "--scorer", "last", "--method", "grasp"),
            *("--samples", "16", "--sequence-length", "512", "--eval-windows", "2", "--dtype", arguments.dtype),
        ]
        peak, seconds = measure(command, output)
        rows.append(
            {
                "depth": depth,
                "checkpoint_bytes": size,
                "peak_resident_bytes": peak,
                "peak_over_checkpoint": round(peak / size, 3),
                "seconds": round(seconds, 1),
            }
        )
        print(rows[-1], flush=True)
        shutil.rmtree(checkpoint)
    ratio = rows[-1]["peak_resident_bytes"] / rows[0]["peak_resident_bytes"]
    print(f"deepest over shallowest: {ratio:.3f}")
    write_report(
        arguments.report,
        {
            "question": "Does peak memory of compress depend on depth?",
            "dtype_of_computation": arguments.dtype,
            "rows": rows,
            "deepest_over_shallowest": round(ratio, 4),
        },
    )


if __name__ == "__main__":
    main()
