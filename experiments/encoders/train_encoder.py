"""A small encoder with a masked-LM head, and a classifier made of it, from scratch, in minutes on a CPU.

    nice python experiments/encoders/train_encoder.py TEXT TEXT [TEXT ...] --output DIR --minutes 10

The classifier tells which of the texts (plain or .xz) a passage is from; its labels are the names of the files. The
last tenth of each text is trained on by neither; passages from its two halves are `calibration.jsonl` and
`test.jsonl`, so that

    layer-surgery compress DIR/classifier --calibration DIR/calibration.jsonl --eval-data DIR/test.jsonl ...

looks at the first and is measured on the second. Half of the minutes go to the encoder and half to the classifier. The
learning rate follows the clock, so a second run does not give the same weights. One thread by default.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from layer_surgery.data.documents import Labelled, LoadedData, Text
from layer_surgery.data.labelled import pack_labelled
from layer_surgery.data.masking import pack_masked, text_windows
from layer_surgery.data.objective import Objective
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.machine import provenance

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "local_attention": 64,
}
SEQUENCE_LENGTH, BATCH_SIZE, WARM_UP, DECAY = 128, 16, 0.05, 0.4
#: Characters of a passage that is classified: one or two sentences, so that it is not too easy.
PASSAGE = 160


def main() -> None:
    """Train both models, and write them with the passages and a log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training (default: 10)")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--passages", type=int, default=600, help="in each of the two files (default: 600)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if len(options.texts) < 2:
        parser.error("give two texts or more: the classifier tells them apart")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    texts = {path.name.split(".")[0]: read_text(path) for path in options.texts}
    trained = {name: text[: len(text) * 9 // 10] for name, text in texts.items()}
    tokenizer = new_tokenizer(trained.values(), options.vocabulary)
    encoder = ModernBertForMaskedLM(encoder_config(tokenizer, SIZES))
    losses = train(encoder, masked_batches(trained, tokenizer, generator), options.minutes / 2, 1e-3)
    save(encoder, tokenizer, options.output / "encoder")
    labels = dict(enumerate(texts))
    named = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    classifier = ModernBertForSequenceClassification.from_pretrained(options.output / "encoder", **named)
    batches = labelled_batches(trained, tokenizer, generator)
    log = {
        "provenance": provenance(torch.device("cpu")),
        "sizes": SIZES | {"vocabulary": len(tokenizer)},
        "minutes": options.minutes,
        "seed": options.seed,
        "masked_lm_loss": losses,
        "classifier_loss": train(classifier, batches, options.minutes / 2, 3e-4),
    }
    save(classifier, tokenizer, options.output / "classifier")
    for part, file in enumerate(("calibration", "test")):
        kept = {
            name: text[len(text) * (18 + part) // 20 : len(text) * (19 + part) // 20] for name, text in texts.items()
        }
        rows = [passage(kept, generator) for _ in range(options.passages)]
        lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
        (options.output / f"{file}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (options.output / "train_log.json").write_text(json.dumps(log, indent=2), encoding="utf-8")


def read_text(path: Path) -> str:
    """Return the text of a file, plain or .xz."""
    content = path.read_bytes()
    return (lzma.decompress(content) if path.suffix == ".xz" else content).decode("utf-8")


def new_tokenizer(texts: Any, vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that is trained on the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((text[:5_000_000] for text in texts), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "cls_token", "sep_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=SIZES["max_position_embeddings"],
        **dict(zip(names, SPECIAL, strict=True)),
    )


def encoder_config(tokenizer: PreTrainedTokenizerBase, sizes: Mapping[str, int]) -> ModernBertConfig:
    """Return the configuration of a ModernBERT of these sizes, with the tokenizer's vocabulary and special tokens."""
    return ModernBertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **sizes,
    )


def masked_batches(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> Iterator[PackedTokens]:
    """Yield batches of masked windows, without end."""
    data = LoadedData("texts", [Text(text) for text in texts.values()], "text")
    ids, text, available = text_windows(data, tokenizer, sequence_length=SEQUENCE_LENGTH)
    objective = Objective(problem="masked_token", padding_id=tokenizer.pad_token_id)
    while True:
        rows = torch.randint(len(ids), (BATCH_SIZE,), generator=generator)
        yield pack_masked(data, tokenizer, objective, (ids[rows], text[rows], available), generator)


def labelled_batches(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> Iterator[PackedTokens]:
    """Yield batches of passages with the names of their texts, without end."""
    objective = Objective(problem="single_label", labels=tuple(texts), padding_id=tokenizer.pad_token_id)
    while True:
        rows = [passage(texts, generator) for _ in range(BATCH_SIZE)]
        data = LoadedData("passages", [Labelled(text, label) for text, label in rows], "labelled")
        yield pack_labelled(data, tokenizer, objective, sequence_length=512, chosen=range(BATCH_SIZE))


def passage(texts: dict[str, str], generator: torch.Generator) -> tuple[str, str]:
    """Return a random passage, and the name of the text it is from."""
    while True:
        name = list(texts)[int(torch.randint(len(texts), (), generator=generator))]
        start = int(torch.randint(max(1, len(texts[name]) - PASSAGE), (), generator=generator))
        found = texts[name][start : start + PASSAGE].strip()
        if found:
            return found, name


def train(model: PreTrainedModel, batches: Iterator[PackedTokens], minutes: float, rate: float) -> list[float]:
    """Train for so many minutes; return the mean loss of each tenth of the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    start, losses = time.monotonic(), [list[float]() for _ in range(10)]
    model.train()
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        tokens = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate * max(0.0, min(1.0, (spent + 1e-3) / WARM_UP, (1 - spent) / DECAY))
        labels: Tensor | None = tokens.labels
        loss = model(**tokens.inputs(slice(0, tokens.sequences)), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[int(10 * spent)].append(loss.item())
    model.eval()
    return [round(sum(part) / len(part), 4) for part in losses if part]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a checkpoint with its tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
