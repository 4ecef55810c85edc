"""CPU time of the passes through one layer and of its decompositions, in both ways.

    python experiments/scale/decompositions.py --hidden 2048 --width 5504

Times are of the process on one thread, not of the wall, and in turn. Passes are measured on few tokens and scaled to
the default number of them, to which they are proportional; decompositions do not depend on it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flops import TOKENS, problems, refit, statistics
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, write_report

from layer_surgery.devices import fast_products, float32_by_onednn

LENGTH = 256


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def passes(hidden: int, width: int, sequences: int, dtype: torch.dtype) -> float:
    """Return the CPU time of forward, forward again and back through a layer, scaled to `TOKENS` tokens."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=width, num_attention_heads=hidden // 128, attn_implementation="sdpa"
    )
    layer = LlamaDecoderLayer(config, 0).to(dtype).requires_grad_(False)
    x = torch.randn(sequences, LENGTH, hidden).to(dtype)
    positions = torch.arange(LENGTH)[None]
    rotation = LlamaRotaryEmbedding(config)(x, positions)

    def work() -> None:
        with torch.no_grad():
            layer(x, position_embeddings=rotation)
        inputs = x.clone().requires_grad_()
        output = layer(inputs, position_embeddings=rotation)
        torch.autograd.backward(output, torch.randn_like(x))

    work()
    return min(seconds(work) for _ in range(2)) * TOKENS / (sequences * LENGTH)


def main() -> None:
    """Measure everything in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=11008)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--ways", nargs="+", default=["leading"], choices=["leading", "exact"])
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "scale" / "decompositions.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with fast_products(torch.device("cpu")):
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measure passes and decompositions, and write the report after each."""
    sizes = arguments.hidden, arguments.width
    found: dict[str, Any] = {"hidden": sizes[0], "width": sizes[1], "tokens of the passes": TOKENS, "seconds": {}}
    found["float32 products"] = "oneDNN" if float32_by_onednn() else "torch's default"
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found["seconds"][f"passes, {name}"] = passes(*sizes, arguments.sequences, dtype)
    layer = problems(*sizes)
    for way in arguments.ways:
        for work in (statistics, refit) if arguments.refit else (statistics,):
            found["seconds"][f"{work.__name__}, {way}"] = seconds(lambda: work(layer, way == "leading"))  # noqa: B023
            print(found["seconds"], flush=True)
            write_report(arguments.report, found)


if __name__ == "__main__":
    main()
