"""Tiny random encoders and classifiers, and labelled tokens for each kind of head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_families import FIELDS, SIZES
from tiny_models import packed_tokens
from tiny_tokenizer import tiny_tokenizer
from tokenizers import processors
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from layer_surgery.checkpoint.heads import HEADS, HeadKind
from layer_surgery.data.objective import NO_LABEL, Objective, Problem
from layer_surgery.data.tokens import PackedTokens

ENCODER_FIELDS: dict[str, dict[str, Any]] = {
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 1, "max_position_embeddings": 66},
    "xlm-roberta": {"type_vocab_size": 1, "max_position_embeddings": 66},
    "mpnet": {"max_position_embeddings": 66},
    "distilbert": {"dim": 32, "hidden_dim": 40, "n_heads": 4},
    "electra": {"embedding_size": 24, "type_vocab_size": 2},
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
        "legacy": False,
    },
    # Windows shorter than the sequences, and layers without a window at a distance.
    "modernbert": {"local_attention": 6, "global_attn_every_n_layers": 3, "cls_token_id": 1, "sep_token_id": 2},
}
#: What `problem_type` in a configuration calls what a classifier of texts is for.
PROBLEM_TYPES: dict[Problem, str] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
LABELS = 3
#: Rows of the embedding of checkpoints with a tokenizer, which has fewer ids.
VOCABULARY_ROWS = 320


def tiny_encoder(
    model_type: str,
    problem: Problem,
    *,
    layers: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **fields: Any,
) -> PreTrainedModel:
    """Return a model with the head for a problem, random weights, biases and norms, in eval mode."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads" or model_type in FIELDS}
    given = sizes | FIELDS.get(model_type, {}) | ENCODER_FIELDS.get(model_type, {})
    given |= {"n_layers" if model_type == "distilbert" else "num_hidden_layers": layers}
    if problem not in ("masked_token", "next_token"):
        given |= {"num_labels": LABELS}
    if problem in PROBLEM_TYPES:
        given |= {"problem_type": PROBLEM_TYPES[problem]}
    auto_class = getattr(transformers, HEADS[head_of(problem)].auto_class)
    config = AutoConfig.for_model(model_type, **given | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms start as ones and biases as zeros, which would hide mistakes
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def head_of(problem: Problem) -> HeadKind:
    """Return the kind of head that solves a problem."""
    kinds: dict[Problem, HeadKind] = {
        "next_token": "causal_lm",
        "masked_token": "masked_lm",
        "tags": "token_classification",
    }
    return kinds.get(problem, "sequence_classification")


def labelled_tokens(problem: Problem, n: int = 5, s: int = 12, *, padding: bool = True, seed: int = 0) -> PackedTokens:
    """Return random sequences with random labels; all but the first are padded on the right."""
    tokens = packed_tokens(n, s, seed=seed, padding=padding)
    generator = torch.Generator().manual_seed(seed + 1)
    objective = Objective(problem=problem, labels=tuple("abc"), padding_id=0, longest=64)
    labels = torch.randint(LABELS, (n,), generator=generator)
    if problem == "regression":
        labels = torch.randn(n, LABELS, generator=generator)
    elif problem == "multi_label":
        labels = torch.randint(2, (n, LABELS), generator=generator).float()
    elif not objective.of_sequences:
        most = LABELS if problem == "tags" else 61
        labels = torch.randint(most, (n, s), generator=generator)
        counted = tokens.valid & (torch.rand(n, s, generator=generator) < 0.5)
        counted[:, 1] = True
        return replace(tokens, objective=objective, labels=labels.masked_fill(~counted, NO_LABEL), loss_mask=counted)
    first = torch.zeros_like(tokens.valid)
    first[:, 0] = True
    return replace(tokens, objective=objective, labels=labels, loss_mask=first)


def own_loss(model: PreTrainedModel, tokens: PackedTokens) -> Tensor:
    """Return the loss that the model computes for itself: the mean over tokens, or over sequences, with a label."""
    labels = tokens.labels
    assert labels is not None
    if labels.is_floating_point():
        labels = labels.to(model.dtype)
    loss: Tensor = model(**tokens.inputs(slice(0, tokens.sequences)), labels=labels).loss
    return loss


# Checkpoints with a tokenizer, and labelled files

WORDS = {"fox": "the quick brown fox jumps", "dog": "over the lazy dog", "one": "one two three", "": "the answer is"}
TAGS = ("O", "B-animal", "I-animal")


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with a token before and behind a text, one between two, and one for masks."""
    tokenizer = tiny_tokenizer(model_max_length=64)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B:1 <eos>:1",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def saved_encoder(directory: Path, problem: Problem, model_type: str = "bert", **fields: Any) -> Path:
    """Save a tiny model with a head, and its tokenizer; labels have the names that the files here use."""
    names: Sequence[str] = TAGS if problem == "tags" else ("fox", "dog", "one")
    given: dict[str, Any] = {"vocab_size": VOCABULARY_ROWS, "dtype": torch.float32}
    if problem not in ("masked_token", "next_token"):
        given |= {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
    model = tiny_encoder(model_type, problem, **given | fields)
    model.save_pretrained(directory)
    encoder_tokenizer().save_pretrained(directory)
    return directory


def labelled_file(path: Path, problem: Problem, *, rows: int = 60, seed: int = 0) -> Path:
    """Write texts with labels (words with tags) of the kind that a problem needs, as JSON lines."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for number in torch.randint(3, (rows,), generator=generator).tolist():
        name = ("fox", "dog", "one")[number]
        text = f"{WORDS[name]} {WORDS['']} {number}"
        row: dict[str, Any] = {"text": text, "label": name}
        if problem == "tags":
            words = text.split()
            row = {"tokens": words, "tags": [TAGS[1] if word in ("fox", "dog") else TAGS[0] for word in words]}
        elif problem == "multi_label":
            row["label"] = [name, "dog"] if number else []
        elif problem == "regression":
            row = {"sentence1": WORDS[name], "sentence2": WORDS[""], "score": [number / 2, 0.5, -number]}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
