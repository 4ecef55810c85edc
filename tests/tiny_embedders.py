"""Tiny random embedding models as directories of sentence-transformers, written without that package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_encoders import VOCABULARY_ROWS, encoder_tokenizer, tiny_encoder
from tiny_families import ENCODERS
from torch import Tensor

from layer_surgery.data.documents import LoadedData, Text
from layer_surgery.data.packing import pack_evaluation
from layer_surgery.data.tokens import PackedTokens

#: Of different lengths, so that they are padded.
TEXTS = (
    "the quick brown fox",
    "dog",
    "over the lazy dog jumps the quick brown fox",
    "one two three",
    "the answer is the fox",
    "a lazy answer",
    "three dogs and two foxes",
)
_TYPES = "sentence_transformers.models."


def dense(in_: int, out: int, *, activation: str = "linear.Identity", seed: int = 3) -> dict[str, Any]:
    """Return a dense module for `saved_embedder`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "linear.weight": torch.randn(out, in_, generator=generator) / in_**0.5,
        "linear.bias": 0.1 * torch.randn(out, generator=generator),
    }
    config = {
        "in_features": in_,
        "out_features": out,
        "bias": True,
        "activation_function": f"torch.nn.modules.{activation}",
    }
    return {"kind": "Dense", "config": config, "tensors": weights}


def saved_embedder(
    directory: Path,
    model_type: str = "bert",
    *,
    pooling: Mapping[str, Any] | str = "mean",
    others: Sequence[Mapping[str, Any]] = ({"kind": "Normalize"},),
    settings: Mapping[str, Any] | None = None,
    transformer: Mapping[str, Any] | None = None,
    folder: str = "",
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> Path:
    """Save a tiny model with a tokenizer and modules behind it; `folder` is where the transformer is."""
    problem = "masked_token" if model_type in ENCODERS else "next_token"
    body = tiny_encoder(model_type, problem, vocab_size=VOCABULARY_ROWS, dtype=dtype, **fields).base_model
    place = directory / folder
    body.save_pretrained(place)
    encoder_tokenizer().save_pretrained(place)
    config = {"embedding_dimension": 32, "pooling_mode": pooling} if isinstance(pooling, str) else dict(pooling)
    modules = [{"kind": "Transformer", "path": folder}, {"kind": "Pooling", "config": config}, *others]
    listed = []
    for number, module in enumerate(modules):
        path = module.get("path", f"{number}_{module['kind']}")
        listed.append({"idx": number, "name": str(number), "path": path, "type": _TYPES + module["kind"]})
        if number:
            (directory / path).mkdir()
            write_json(directory / path / "config.json", module.get("config", {}))
        if "tensors" in module:
            tensors: dict[str, Tensor] = {name: t.to(dtype) for name, t in module["tensors"].items()}
            save_file(tensors, directory / path / "model.safetensors")
    write_json(directory / "modules.json", listed)
    write_json(
        place / "sentence_bert_config.json", {"max_seq_length": 60, "do_lower_case": False, **(transformer or {})}
    )
    write_json(directory / "config_sentence_transformers.json", settings or {"prompts": {}})
    return directory


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def text_tokens(objective: Any, texts: Sequence[str] = TEXTS, sequence_length: int = 40) -> PackedTokens:
    """Return texts as a model gets them, one a sequence, in their order."""
    data = LoadedData("texts", [Text(text) for text in texts], "text")
    return pack_evaluation(data, encoder_tokenizer(), sequence_length=sequence_length, objective=objective)
