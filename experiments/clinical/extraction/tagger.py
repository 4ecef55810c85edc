"""The tagger: an encoder trained on unlabelled notes, a token classifier of it, and what it finds in notes.

Documents are packed by Layer Surgery itself, in training as in use: words with spaces between them, those that are
longer than a window in overlapping windows, so that nothing is cut off. Training is by transformers' `Trainer`, with a
fixed number of steps: the same seed gives the same weights on the same machine.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    ModernBertForMaskedLM,
    ModernBertForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from extraction.notes import Span
from extraction.tags import TAGS, check_classes, spans_of, tags_of, words_of
from layer_surgery.data.documents import LoadedData, Tagged
from layer_surgery.data.labelled import pack_labelled
from layer_surgery.data.objective import NO_LABEL, Objective
from layer_surgery.data.tokens import PackedTokens

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "encoders"))
from train_encoder import encoder_config, new_tokenizer

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "max_position_embeddings": 512,
    "local_attention": 64,
}
WINDOW, OVERLAP, BATCH_SIZE, VOCABULARY = 128, 32, 8, 1024
_ENCODER_RATE, _TAGGER_RATE = 2e-3, 1e-3


def train_encoder(texts: Sequence[str], directory: Path, *, steps: int, seed: int) -> float:
    """Train tokenizer and encoder on texts by masked language modelling, write both; return the last steps' loss."""
    joined = [_joined(text) for text in texts]
    tokenizer = new_tokenizer(joined, VOCABULARY)
    ids = tokenizer("\n".join(joined), add_special_tokens=False, verbose=False)["input_ids"]
    room = WINDOW - 2
    rows = [
        {"input_ids": [tokenizer.cls_token_id, *ids[start : start + room], tokenizer.sep_token_id]}
        for start in range(0, len(ids) - room + 1, room)
    ]
    torch.manual_seed(seed)
    model = ModernBertForMaskedLM(encoder_config(tokenizer, SIZES))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
    loss = train(model, rows, collator, steps=steps, rate=_ENCODER_RATE, seed=seed)
    save(model, tokenizer, directory)
    return loss


def train_tagger(
    encoder: Path,
    texts: Sequence[str],
    labels: Sequence[Sequence[Span]],
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    seed: int,
) -> float:
    """Train a token classifier from the encoder, and write it; return the last steps' loss.

    Raises `LabelError`: a span that is not in its text, or a kind that has no span at all.
    """
    check_classes(labels, "the labels to train on")
    tags = [tags_of(text, spans, f"note {n}") for n, (text, spans) in enumerate(zip(texts, labels, strict=True), 1)]
    packed = pack(texts, tags, tokenizer)
    assert packed.labels is not None
    rows = [
        {"input_ids": ids[valid].tolist(), "labels": answer[valid].tolist()}
        for ids, valid, answer in zip(packed.token_ids, packed.valid, packed.labels, strict=True)
    ]
    named = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: number for number, tag in enumerate(TAGS)}}
    torch.manual_seed(seed)
    model = ModernBertForTokenClassification.from_pretrained(encoder, **named)
    collator = DataCollatorForTokenClassification(tokenizer)
    loss = train(model, rows, collator, steps=steps, rate=_TAGGER_RATE, seed=seed)
    save(model, tokenizer, directory)
    return loss


def train(model: PreTrainedModel, rows: Any, collator: Any, *, steps: int, rate: float, seed: int) -> float:
    """Train a model for so many steps; return the mean loss of the last tenth of them."""
    every = max(1, steps // 10)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=rate,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=every,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            logging_steps=every,
            logging_strategy="steps",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
    model.eval()
    return round([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1], 4)


@torch.no_grad()
def find(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[Span]]:
    """Return the spans that a tagger finds in each text, of whatever length."""
    packed = pack(texts, None, tokenizer)
    assert packed.labels is not None and packed.documents is not None
    lengths = packed.valid.sum(dim=1)
    given = torch.full_like(packed.labels, NO_LABEL)
    for rows in lengths.argsort(stable=True).split(BATCH_SIZE):
        longest = int(lengths[rows].max())
        ids, valid = packed.token_ids[rows, :longest], packed.valid[rows, :longest]
        given[rows, :longest] = model(input_ids=ids, attention_mask=valid.long()).logits.argmax(dim=-1)
    answered = packed.labels != NO_LABEL
    # Row by row, so the tags of a document's windows follow one another: each word has one in one window.
    flat, sizes = given[answered].tolist(), torch.zeros(len(texts), dtype=torch.int64)
    sizes.index_add_(0, packed.documents, answered.sum(dim=1))
    found, start = [], 0
    for text, size in zip(texts, sizes.tolist(), strict=True):
        found.append(spans_of(text, [TAGS[tag] for tag in flat[start : start + size]]))
        start += size
    return found


def pack(
    texts: Sequence[str], tags: Sequence[Sequence[str]] | None, tokenizer: PreTrainedTokenizerBase
) -> PackedTokens:
    """Pack documents in windows, with their tags or, where there are none, with `O` to mark one token a word."""
    documents = []
    for number, text in enumerate(texts):
        words = [text[start:end] for start, end in words_of(text)]
        documents.append(Tagged(words, list(tags[number]) if tags is not None else ["O"] * len(words)))
    objective = Objective(
        problem="tags", labels=TAGS, padding_id=tokenizer.pad_token_id, longest=SIZES["max_position_embeddings"]
    )
    data = LoadedData("notes", documents, "tagged")
    chosen = range(len(documents))
    return pack_labelled(data, tokenizer, objective, sequence_length=WINDOW, chosen=chosen, overlap=OVERLAP)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a checkpoint with its tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _joined(text: str) -> str:
    """Return a text as the tagger meets it: a space between words."""
    return " ".join(text[start:end] for start, end in words_of(text))
