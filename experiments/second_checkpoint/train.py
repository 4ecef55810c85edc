"""A second small checkpoint, of another family than the demo's: Qwen2, 16 layers, 4.8 M parameters, from scratch.

    nice python experiments/second_checkpoint/train.py TRAIN_TEXT HELD_OUT_TEXT --output DIR --minutes 70

The last tenth of TRAIN_TEXT (plain or .xz) is never trained on, so that other experiments can calibrate on it.
HELD_OUT_TEXT decides nothing; it is measured now and then, and whole at the end. The learning rate follows the clock
and not the steps, so that the decay surely comes on a machine with other work to do; how many tokens are seen depends
on the machine, and a second run does not give the same weights. `DIR/checkpoint` and `DIR/train_log.json` are written
every few minutes. One thread by default: two that wait for each other are slower than one where other work keeps the
cores busy.

`--after DIR` goes on from what an earlier run wrote (weights, not the optimizers' state), with a warm-up and a decay
of its own; give it another seed, for other windows in another order.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import lzma
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT

from layer_surgery.machine import provenance

ARCHITECTURE = {
    "hidden_size": 160,
    "intermediate_size": 384,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about the training but its text and its time. Fractions are of the minutes."""

    sequence_length: int = 256
    batch_size: int = 8
    trained_part: float = 0.9
    """The first part of the text; the rest is kept aside."""
    matrix_learning_rate: float = 0.02
    """Muon, for the matrices of the layers."""
    matrix_weight_decay: float = 0.05
    other_learning_rate: float = 3e-3
    """AdamW without decay, for embedding, norms and biases."""
    warmup: float = 0.02
    decay: float = 0.4
    seed: int = 0

    def learning_rate_factor(self, spent: float) -> float:
        """Return warm-up, constant, linear decay to 0, when this fraction of the minutes is spent."""
        return max(0.0, min(1.0, (spent + 1e-3) / self.warmup, (1.0 - spent) / self.decay))


@dataclass(kw_only=True)
class Progress:
    """How far a run has come."""

    steps: int = 0
    tokens: int = 0
    minutes: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    """Mean training loss since the point before, and held-out perplexity on the first windows."""


def main() -> None:
    """Train, and write the checkpoint with its log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_text", type=Path)
    parser.add_argument("held_out_text", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--minutes", type=float, default=70.0, help="of training, without compilation (default: 70)")
    parser.add_argument("--save-minutes", type=float, default=4.0, help="between two saves (default: 4)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--after", type=Path, metavar="DIR", help="output of an earlier run to go on from")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(seed=arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    text = read_text(arguments.train_text)
    stream = encode(tokenizer, text[: int(len(text) * recipe.trained_part)])
    held_out = encode(tokenizer, read_text(arguments.held_out_text))
    model = new_model(tokenizer, recipe.seed)
    if arguments.after is not None:
        model = Qwen2ForCausalLM.from_pretrained(arguments.after / "checkpoint", dtype="float32")
    print(f"{parameters(model):,} parameters, {len(stream):,} tokens to train on", flush=True)
    log: dict[str, Any] = {
        "provenance": provenance(torch.device("cpu")),
        "data": {
            "trained on": describe(arguments.train_text) | {"part": recipe.trained_part, "tokens": len(stream)},
            "held out": describe(arguments.held_out_text) | {"tokens": len(held_out)},
        },
        "model": ARCHITECTURE | {"vocab_size": len(tokenizer), "parameters": parameters(model)},
        "recipe": asdict(recipe) | {"minutes": arguments.minutes, "compiled": not arguments.no_compile},
    }
    if arguments.after is not None:
        log["after"] = json.loads((arguments.after / "train_log.json").read_text(encoding="utf-8"))
    progress = Progress()
    since = {"time": time.monotonic(), "loss": 0.0, "steps": 0}
    for loss in train(model, stream, recipe, progress, arguments.minutes, compiled=not arguments.no_compile):
        since["loss"] += loss
        since["steps"] += 1
        if time.monotonic() - since["time"] < 60 * arguments.save_minutes:
            continue
        point = {"tokens": progress.tokens, "minutes": round(progress.minutes, 1)}
        point |= {"training loss": round(since["loss"] / since["steps"], 4)}
        point |= {"held-out perplexity": round(perplexity(model, held_out[: 64 * 256], 256), 2)}
        progress.curve.append(point)
        print(point, flush=True)
        save(model, tokenizer, arguments.output, log | asdict(progress))
        since = {"time": time.monotonic(), "loss": 0.0, "steps": 0}
    save(model, tokenizer, arguments.output, log | asdict(progress))
    saved = AutoModelForCausalLM.from_pretrained(arguments.output / "checkpoint", dtype="float32")
    final = {"held_out_perplexity": perplexity(saved, held_out, recipe.sequence_length)}
    save(model, tokenizer, arguments.output, log | final | asdict(progress))
    print(final, flush=True)


def read_text(path: Path) -> str:
    """Read UTF-8 text, decompressing .xz."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")


def describe(path: Path) -> dict[str, str]:
    """Return name and hash of a file, without the folder, which is the machine's own affair."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def encode(tokenizer: PreTrainedTokenizerBase, text: str, characters: int = 1 << 20) -> Tensor:
    """Encode a long text in pieces that end at line ends; return the token ids as one row of int64."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + characters) + 1 or len(text)
        pieces.append(torch.tensor(tokenizer.encode(text[start:end], add_special_tokens=False)))
        start = end
    return torch.cat(pieces)


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """Make the model with random weights, in float32."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return Qwen2ForCausalLM(Qwen2Config(**ARCHITECTURE, **tokens))


def parameters(model: torch.nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def batches(stream: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Yield batches (B, S) for ever: each epoch cuts the stream from another offset, in another order."""
    generator = torch.Generator().manual_seed(recipe.seed)
    length = recipe.sequence_length
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(stream) - offset) // length
        windows = stream[offset : offset + count * length].view(count, length)
        for rows in torch.randperm(count, generator=generator).split(recipe.batch_size):
            if len(rows) == recipe.batch_size:  # one shape, compiled once
                yield windows[rows]


def loss_of(model: Qwen2ForCausalLM, ids: Tensor) -> Tensor:
    """Return the mean loss in nats of predicting ids (B, S) after the first of each row."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logits = F.linear(hidden, model.lm_head.weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for everything else."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.matrix_weight_decay),
        torch.optim.AdamW(others, lr=recipe.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: Qwen2ForCausalLM, stream: Tensor, recipe: Recipe, progress: Progress, minutes: float, *, compiled: bool
) -> Iterator[float]:
    """Train until the minutes are over; yield the loss of every step. Changes the model and the progress."""
    both = optimizers(model, recipe)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in both]
    compute = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    model.train()
    start = None
    for ids in batches(stream, recipe):
        spent = 0.0 if start is None else (time.monotonic() - start) / (60 * minutes)
        if spent >= 1.0:
            return
        for optimizer, peak in zip(both, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * recipe.learning_rate_factor(spent)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compute(model, ids)
        loss.backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        if start is None:  # the first step compiles
            start = time.monotonic()
        progress.steps += 1
        progress.tokens += ids.numel()
        progress.minutes = (time.monotonic() - start) / 60
        yield loss.item()


@torch.inference_mode()
def perplexity(model: Qwen2ForCausalLM, ids: Tensor, length: int) -> float:
    """Return the perplexity over whole windows that do not overlap, in float32."""
    windows = ids[: len(ids) // length * length].view(-1, length)
    total = sum(float(loss_of(model, rows)) * len(rows) for rows in windows.split(16))
    return math.exp(total / len(windows))


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, log: dict[str, Any]) -> None:
    """Write the checkpoint in bfloat16 and the log; there is a whole checkpoint at every moment but one."""
    new, checkpoint = folder / "checkpoint.new", folder / "checkpoint"
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(new)
    tokenizer.save_pretrained(new)
    shutil.rmtree(checkpoint, ignore_errors=True)
    new.rename(checkpoint)
    (folder / "train_log.json").write_text(json.dumps(log, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
