"""A small embedding model in the layout of sentence-transformers, from text alone, in minutes on a CPU.

    nice python experiments/encoders/train_embedder.py TEXT [TEXT ...] --output DIR --minutes 30 [--encoder DIR]

A third of the minutes goes to masked language modelling (as `train_encoder.py` does it; with `--encoder`, its result is
taken and all minutes go to what follows). Then the mean of the last hidden states is trained by contrast: what stands
before a place in a text and what stands behind it belong together, and all others of the batch do not (InfoNCE, van den
Oord et al., https://arxiv.org/abs/1807.03748; neighbours as positives as in Contriever,
https://arxiv.org/abs/2112.09118). No labels.

The last tenth of each text is trained on by neither; the log has how often the right neighbour is found there among
256. `DIR` has a sentence-transformers model: the encoder, `modules.json`, `1_Pooling`, `2_Normalize`. The learning rate
follows the clock, so a second run does not give the same weights. One thread by default.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_encoder import SIZES, encoder_config, masked_batches, new_tokenizer, read_text, train
from transformers import AutoModel, AutoTokenizer, ModernBertForMaskedLM, PreTrainedTokenizerFast

from layer_surgery.machine import provenance

#: Characters on both sides of a place, tokens of a passage, pairs in a batch.
AROUND, LONGEST, PAIRS = 260, 64, 32
TEMPERATURE, RATE, WARM_UP, DECAY = 0.05, 5e-4, 0.05, 0.5
SENTENCE_ENDS = re.compile(r"(?<=[.!?])[\"')]*\s+")
#: Held-out pairs among which neighbours are looked for.
CHECKED = 256


def main() -> None:
    """Train an encoder unless one is given, then the embedding model, and write it with a log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, help="a masked-LM checkpoint to begin with")
    parser.add_argument("--minutes", type=float, default=30.0, help="of training (default: 30)")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    texts = {path.name.split(".")[0]: read_text(path) for path in options.texts}
    trained = [text[: len(text) * 9 // 10] for text in texts.values()]
    held_out = [text[len(text) * 9 // 10 :] for text in texts.values()]
    log: dict[str, Any] = {"provenance": provenance(torch.device("cpu")), "minutes": options.minutes}
    log |= {"seed": options.seed, "texts": list(texts), "pairs": PAIRS, "temperature": TEMPERATURE}
    minutes = options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        encoder = options.encoder or Path(scratch)
        if options.encoder is None:
            minutes = options.minutes * 2 / 3
            named = dict(zip(texts, trained, strict=True))
            log["masked_lm_loss"] = new_encoder(named, encoder, options.vocabulary, options.minutes / 3, generator)
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    embedder = Embedder(model, tokenizer)
    log["contrastive_loss"] = train_by_contrast(embedder, trained, minutes, generator)
    log["held_out_top1"] = found_neighbours(embedder, held_out, torch.Generator().manual_seed(options.seed))
    save(embedder, options.output)
    (options.output / "train_log.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.output}; the right one of {CHECKED} is found for {log['held_out_top1']:.1%}")


def new_encoder(
    texts: dict[str, str], directory: Path, vocabulary: int, minutes: float, generator: torch.Generator
) -> list[float]:
    """Train an encoder with a masked-LM head from scratch, write it, and return its losses."""
    tokenizer = new_tokenizer(texts.values(), vocabulary)
    model = ModernBertForMaskedLM(encoder_config(tokenizer, SIZES))
    losses = train(model, masked_batches(texts, tokenizer, generator), minutes, 1e-3)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return losses


class Embedder(nn.Module):
    """An encoder and the mean of its last hidden states over the tokens of a text."""

    def __init__(self, encoder: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer

    def forward(self, texts: list[str]) -> Tensor:
        """Return one vector for each text, [n, D], of length 1."""
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        hidden = self.encoder(**inputs).last_hidden_state
        counted = inputs["attention_mask"][..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * counted).sum(dim=1) / counted.sum(dim=1), dim=1)


def train_by_contrast(embedder: Embedder, texts: list[str], minutes: float, generator: torch.Generator) -> list[float]:
    """Train for so many minutes; return the mean loss of each tenth of the time."""
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=RATE, weight_decay=0.01)
    start, losses = time.monotonic(), [list[float]() for _ in range(10)]
    embedder.train()
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * max(0.0, min(1.0, (spent + 1e-3) / WARM_UP, (1 - spent) / DECAY))
        pairs = [neighbours(texts, generator) for _ in range(PAIRS)]
        vectors = embedder([text for side in zip(*pairs, strict=True) for text in side])
        similarities = vectors[:PAIRS] @ vectors[PAIRS:].T / TEMPERATURE
        right = torch.arange(PAIRS)
        loss = sum(nn.functional.cross_entropy(each, right) for each in (similarities, similarities.T)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(embedder.parameters(), 1.0)
        optimizer.step()
        losses[int(10 * spent)].append(loss.item())
    embedder.eval()
    return [round(sum(part) / len(part), 4) for part in losses if part]


@torch.no_grad()
def found_neighbours(embedder: Embedder, texts: list[str], generator: torch.Generator) -> float:
    """Return for which share of passages of the held-out text the nearest of `CHECKED` is its neighbour."""
    pairs = [neighbours(texts, generator) for _ in range(CHECKED)]
    before, behind = (torch.cat([embedder(list(side[k : k + 64])) for k in range(0, CHECKED, 64)])
                      for side in zip(*pairs, strict=True))  # fmt: skip
    return float(((before @ behind.T).argmax(dim=1) == torch.arange(CHECKED)).float().mean())


def neighbours(texts: list[str], generator: torch.Generator) -> tuple[str, str]:
    """Return the sentences before a random place of a random text, and those behind it."""
    while True:
        text = texts[int(torch.randint(len(texts), (), generator=generator))]
        start = int(torch.randint(max(1, len(text) - 2 * AROUND), (), generator=generator))
        sentences = SENTENCE_ENDS.split(text[start : start + 2 * AROUND])[1:-1]  # the first and the last are cut
        if len(sentences) >= 2:
            middle = len(sentences) // 2
            return " ".join(sentences[:middle]), " ".join(sentences[middle:])


def save(embedder: Embedder, directory: Path) -> None:
    """Write the files that `SentenceTransformer(directory)` reads."""
    embedder.encoder.save_pretrained(directory)
    embedder.tokenizer.save_pretrained(directory)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    size = embedder.encoder.config.hidden_size
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": SIZES["max_position_embeddings"], "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None},
        "1_Pooling/config.json": {"word_embedding_dimension": size, "pooling_mode_mean_tokens": True},
    }
    (directory / "2_Normalize").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
