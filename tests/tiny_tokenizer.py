"""A small real tokenizer, built in the process: no files, no network."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|start|>", "<|end|>"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "the answer is the other thing",
    "one two three\n\n\n\nfour",
] * 8


def tiny_tokenizer(
    *,
    adds_bos: bool = False,
    adds_eos: bool = False,
    eos: str | None = "<eos>",
    bos: str | None = "<bos>",
    pad: str | None = "<pad>",
    chat_template: str | None = None,
    marks_beginning: bool = False,
    model_max_length: int = 32,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of about 300 tokens.

    Args:
        adds_bos: put `bos` before a text by itself.
        adds_eos: put `eos` behind a text by itself.
        marks_beginning: put a "▁" before every text, as the tokenizer of Llama 2 does.
        model_max_length: short, so that a length warning would be seen.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if marks_beginning:
        backend.normalizer = normalizers.Prepend("▁")
    if adds_bos or adds_eos:
        single = f"{bos if adds_bos else ''} $A {eos if adds_eos else ''}".strip()
        used = {token for token, added in ((bos, adds_bos), (eos, adds_eos)) if added and token}
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, backend.token_to_id(token)) for token in used]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=model_max_length
    )
    tokenizer.chat_template = chat_template
    return tokenizer
