"""How much of reading is hidden when the next layer is read while this one computes?

    python experiments/scale/overlap.py WORK_DIR [--hidden 1024 --width 2816 --layers 12] [--tokens 256 1024 4096]

A random checkpoint is walked over in three ways, which take turns: its files in the page cache; its files out of it
(`posix_fadvise`, so that every byte comes from the disk); and out of it with the next layer read ahead. The share of
reading that is hidden is `(cold - ahead) / (cold - warm)`, from medians of wall seconds. Also reported: CPU seconds,
the seconds that reading the layers alone takes, and whether all three gave the same bytes. Nothing can be hidden behind
less work than reading takes, so several numbers of tokens are walked over.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from random_checkpoint import make_checkpoint
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, write_report

from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.data.tokens import packed_tokens
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk, WalkSettings

WAYS = {"warm": 0, "cold": 0, "ahead": 1 << 40}
LENGTH = 256


def drop_from_page_cache(directory: Path) -> None:
    """Have the system forget the bytes of a checkpoint's files."""
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def walked(directory: Path, way: str, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Walk over all layers; return seconds and a hash of the last hidden states."""
    checkpoint = open_checkpoint(directory)
    device = torch.device("cpu")
    model = StreamedModel(checkpoint, device=device, dtype=dtype, resident_bytes=0, ahead_bytes=WAYS[way])
    shape = (max(1, tokens // LENGTH), min(tokens, LENGTH))
    ids = torch.randint(checkpoint.vocabulary_size, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(shape, dtype=torch.bool)
    packed = packed_tokens("random", ids, mask, mask, ids.numel())
    with Walk(model, packed, WalkSettings(batch_size=8, scratch=directory)) as walk:
        if way == "warm":
            for path in directory.glob("*.safetensors"):
                path.read_bytes()
        else:
            drop_from_page_cache(directory)
        wall, cpu = time.perf_counter(), time.process_time()
        last = walk.forward(range(model.layer_count), keep=False)
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        found = last.read(slice(0, shape[0])).float().numpy().tobytes()
    return {**seconds, "sha256": hashlib.sha256(found).hexdigest()}


def read_alone(directory: Path) -> float:
    """Return the seconds that reading the layers takes, from the disk."""
    drop_from_page_cache(directory)
    checkpoint = open_checkpoint(directory)
    start = time.perf_counter()
    for index in range(checkpoint.layer_count):
        checkpoint.source.read(checkpoint.layer_tensors(index), torch.device("cpu"))
    return time.perf_counter() - start


def measured(directory: Path, tokens: int, repeats: int, dtype: torch.dtype) -> dict[str, Any]:
    """Walk in all ways in turn; return medians and the share of reading that is hidden."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            runs[way].append(walked(directory, way, tokens, dtype))
    seconds = {way: {kind: median(run[kind] for run in runs[way]) for kind in ("wall", "cpu")} for way in WAYS}
    reading = seconds["cold"]["wall"] - seconds["warm"]["wall"]
    hidden = seconds["cold"]["wall"] - seconds["ahead"]["wall"]
    return {
        "tokens": tokens,
        "seconds": seconds,
        "share of reading hidden": round(hidden / reading, 3) if reading > 0 else None,
        "cpu seconds, ahead over cold": round(seconds["ahead"]["cpu"] / seconds["cold"]["cpu"], 3),
        "same bytes": len({run["sha256"] for of in runs.values() for run in of}) == 1,
    }


def main() -> None:
    """Make the checkpoint if it is not there, and measure every number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path)
    for name, default in (("hidden", 1024), ("width", 2816), ("layers", 12), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "scale" / "overlap.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        vocab_size=4096,
    )
    directory = arguments.work_dir / f"overlap-{arguments.hidden}-{arguments.width}-{arguments.layers}"
    size = 0 if directory.exists() else make_checkpoint(directory, config)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    rows = [measured(directory, tokens, arguments.repeats, dtype) for tokens in arguments.tokens]
    shape = {name: getattr(arguments, name) for name in ("hidden", "width", "layers", "threads", "repeats", "dtype")}
    alone = round(read_alone(directory), 3)
    write_report(arguments.report, {"shape": shape, "bytes": size, "seconds of reading alone": alone, "rows": rows})
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    main()
