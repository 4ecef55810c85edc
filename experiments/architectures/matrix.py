"""What works for which architecture: every cell is measured on a tiny random model.

    python experiments/architectures/matrix.py [MODEL_TYPE ...]

Models come from tests/tiny_families.py: small, random, with every kind of layer of their family. They go through the
tool as a user's would: saved to disk, `layer_surgery.compress`, loaded by transformers. A cell is a number (the largest
difference between logits, as a fraction of the largest logit; 0 is identical to the last bit) or what went wrong.
Writes reports/architectures/matrix.json and matrix.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
from common import ROOT, write_report
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_families import DECODERS, LAYERS
from tiny_models import largest_difference, packed_tokens, settings, streamed, tiny_model, walked_logits, without_layers
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import layer_surgery
from layer_surgery.checkpoint.modeling_layer_surgery import LowRankLinear
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.records import LayerPlan, SurgeryPlan

VOCABULARY = 320
REMOVED = [0, 3]
RANK = 3
#: Below this a difference is rounding (float32): two products are not one product, and kernels for mixtures of experts
#: depend on how tokens are batched.
ROUNDING = 1e-4
TOKENS = packed_tokens(3, 16, vocabulary=VOCABULARY)

COLUMNS = {
    "walk": "walk equals forward",
    "removal": "removal equals deletion by hand",
    "low_rank": "low rank equals its dense product",
    "load_plain": "plain loads identically",
    "load_low_rank": "low-rank loads identically",
    "load_refitted": "refitted loads identically",
    "generate_plain": "plain generates with cache",
    "generate_low_rank": "low-rank generates with cache",
    "lora_plain": "LoRA on plain",
    "lora_low_rank": "LoRA on low-rank",
}


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(TOKENS.token_ids, use_cache=False).logits


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    return float(model(TOKENS.token_ids, labels=TOKENS.token_ids, use_cache=False).loss)


def load(directory: Path) -> PreTrainedModel:
    """Load as a user does who has transformers only."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=True).eval()


@dataclass
class Subject:
    """A tiny model on disk, what is made of it, and the measurements."""

    model_type: str
    scratch: Path
    notes: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def path(self) -> Path:
        fields = {"use_sliding_window": False, "no_rope_layer_interval": 4} if self.model_type == "smollm3" else {}
        model = tiny_model(
            self.model_type,
            layers=LAYERS.get(self.model_type, 5),
            dtype=torch.float32,
            vocab_size=VOCABULARY,
            **fields,
        )
        model.save_pretrained(self.scratch / "model")
        tiny_tokenizer().save_pretrained(self.scratch / "model")
        return self.scratch / "model"

    @cached_property
    def model(self) -> PreTrainedModel:
        return load(self.path)

    @cached_property
    def plain(self) -> Path:
        layer_surgery.compress(self.path, self.scratch / "plain", layers=REMOVED, keep=0, refit=False, eval_data=None)
        return self.scratch / "plain"

    @cached_property
    def refitted(self) -> Path:
        """The same with the refit that is the tool's default."""
        output = self.scratch / "refitted"
        layer_surgery.compress(self.path, output, layers=REMOVED, keep=0, samples=8, sequence_length=32, eval_data=None)
        return output

    @cached_property
    def low_rank(self) -> Path:
        """One layer removed, one with all its linears at rank 3 by the default method."""
        checkpoint = open_checkpoint(self.path)
        prefix = checkpoint.layer_prefix(1)
        ranks = {n: RANK for n in checkpoint.architecture.linears if f"{prefix}{n}.weight" in checkpoint.source.specs}
        self.notes["linears"] = list(ranks)
        layers = [LayerPlan(index=i, action="keep") for i in range(checkpoint.layer_count)]
        layers[0] = LayerPlan(index=0, action="remove")
        layers[1] = LayerPlan(index=1, action="low_rank", ranks=ranks)
        plan = SurgeryPlan(method="fisher", target_layers=len(layers) - 2, layers=layers)
        layer_surgery.compress(
            self.path, self.scratch / "low_rank", plan=plan, samples=8, sequence_length=32, refit=False, eval_data=None
        )
        return self.scratch / "low_rank"

    # The cells

    def walk(self) -> float:
        logits = walked_logits(
            streamed(self.path, dtype=torch.float32, resident_bytes=0), TOKENS, settings(self.scratch)
        )
        return largest_difference(logits, logits_of(self.model))

    def removal(self) -> float:
        return largest_difference(logits_of(load(self.plain)), logits_of(without_layers(self.model, REMOVED)))

    def low_rank_product(self) -> float:
        """Put the product of the factors into the original by hand."""
        loaded = load(self.low_rank)
        by_hand = without_layers(self.model, [0])
        for name, module in loaded.named_modules():
            if isinstance(module, LowRankLinear) or type(module).__name__ == "LowRankLinear":
                target: Any = by_hand.get_submodule(name)
                product = module.out_factor.weight.double() @ module.in_factor.weight.double()
                target.weight.data = (product.T if isinstance(target, Conv1D) else product).float().contiguous()
        return largest_difference(logits_of(loaded), logits_of(by_hand))

    def loads_identically(self, directory: Path) -> float:
        """Compare the walk over the saved checkpoint with the model that transformers loads."""
        walked = walked_logits(
            streamed(directory, dtype=torch.float32), TOKENS, settings(self.scratch, batch_size=TOKENS.sequences)
        )
        return largest_difference(walked, logits_of(load(directory)))

    def generates(self, directory: Path) -> float:
        model = load(directory)
        model.generation_config.eos_token_id = None
        texts = [
            model.generate(TOKENS.token_ids[:2, :5], max_new_tokens=10, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        return float((texts[0] != texts[1]).sum())

    def lora(self, directory: Path) -> float:
        """Train LoRA adapters on every linear for three steps, save, load them on the model anew, compare logits."""
        model = load(directory)
        head = model.get_output_embeddings()
        kinds = (nn.Linear, Conv1D)
        targets = [n for n, m in model.named_modules() if isinstance(m, kinds) and m is not head]
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        before = logits_of(adapted.eval()), loss_of(adapted)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            loss = adapted.train()(input_ids=TOKENS.token_ids, labels=TOKENS.token_ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = logits_of(adapted.eval())
        if not loss_of(adapted) < before[1] or largest_difference(before[0], after) < 1e-4:
            raise AssertionError(f"three steps did not train: the loss went from {before[1]} to {loss_of(adapted)}")
        with tempfile.TemporaryDirectory(dir=self.scratch) as saved:
            adapted.save_pretrained(saved)
            reloaded = PeftModel.from_pretrained(load(directory), saved).eval()
            return largest_difference(logits_of(reloaded), after)

    def cells(self) -> dict[str, Callable[[], float]]:
        return {
            "walk": self.walk,
            "removal": self.removal,
            "low_rank": self.low_rank_product,
            "load_plain": lambda: self.loads_identically(self.plain),
            "load_low_rank": lambda: self.loads_identically(self.low_rank),
            "load_refitted": lambda: self.loads_identically(self.refitted),
            "generate_plain": lambda: self.generates(self.plain),
            "generate_low_rank": lambda: self.generates(self.low_rank),
            "lora_plain": lambda: self.lora(self.plain),
            "lora_low_rank": lambda: self.lora(self.low_rank),
        }


def measure(model_type: str) -> dict[str, Any]:
    """Return every cell of a row; a failure stays in its cell, with the reason."""
    with tempfile.TemporaryDirectory() as scratch:
        subject = Subject(model_type, Path(scratch))
        row: dict[str, Any] = {}
        for name, cell in subject.cells().items():
            try:
                value = cell()
                row[name] = {"ok": value <= (0 if name.startswith("generate") else ROUNDING), "difference": value}
            except Exception as error:  # the reason is the result
                row[name] = {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        config = open_checkpoint(subject.path).config
        return {"model_type": model_type, "layers": config.num_hidden_layers, "cells": row, **subject.notes}


def as_text(cell: dict[str, Any], column: str) -> str:
    if "error" in cell:
        return "**fails**"
    if column.startswith("generate"):
        return "same tokens" if cell["ok"] else f"**{cell['difference']:.0f} tokens differ**"
    value = "0" if cell["difference"] == 0 else f"{cell['difference']:.0e}"
    return value if cell["ok"] else f"**{value}**"


def page(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown, failures with their reasons below it."""
    lines = [
        "# Architectures",
        "",
        "Made by `experiments/architectures/matrix.py` together with `matrix.json`; no cell by hand. One tiny",
        "random float32 model of each type, with every kind of layer of its family, saved, compressed and loaded as a",
        "user's would be. Numbers are the largest difference between logits, as a fraction of the largest logit: 0 is",
        f"identical to the last bit, up to {ROUNDING:.0e} counts as rounding. LoRA: adapters on every linear (in",
        "low-rank layers on the factors) are trained for three steps, saved, and loaded on the model anew; the number",
        "compares the logits.",
        "",
        "| model_type | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in rows:
        cells = [as_text(row["cells"][name], name) for name in COLUMNS]
        lines.append(f"| `{row['model_type']}` | " + " | ".join(cells) + " |")
    bad = [(row, name) for row in rows for name in COLUMNS if not row["cells"][name]["ok"]]
    good = len(rows) * len(COLUMNS) - len(bad)
    lines += ["", f"{good} of {len(rows) * len(COLUMNS)} cells are as they should be."]
    for row, name in bad:
        cell = row["cells"][name]
        reason = cell.get("error") or f"difference {cell['difference']:.1e}"
        lines += ["", f"- `{row['model_type']}`, {COLUMNS[name]}: {reason}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="default: all that are listed")
    parser.add_argument("--output", type=Path, default=ROOT / "reports" / "architectures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for model_type in options.model_types or DECODERS:
        rows.append(measure(model_type))
        print(model_type, *(as_text(rows[-1]["cells"][name], name) for name in COLUMNS), sep="  ", flush=True)
    write_report(options.output / "matrix.json", {"rounding": ROUNDING, "rows": rows})
    (options.output / "matrix.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
