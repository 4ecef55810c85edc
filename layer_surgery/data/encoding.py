"""Documents as token ids: texts as one stream, examples and chats with the mask of tokens that carry loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layer_surgery.data.documents import Chat, Example, LoadedData, Text
from layer_surgery.data.rendering import SECONDS, rendered
from layer_surgery.errors import DataError

SEPARATOR = "\n\n"
"""Stands between two texts in the stream."""

_BATCH = 256  # documents given to the tokenizer at once


@dataclass(frozen=True)
class EncodedExample:
    """One example or chat; it is never split."""

    token_ids: list[int]
    carries_loss: list[bool]  #: Same length; the first is always False, because no token of this example predicts it.

    def __len__(self) -> int:
        return len(self.token_ids)


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the BOS token if the tokenizer puts one before a text by itself, else None.

    Asked of a text that is not empty, so that an EOS behind it with the same id is not taken for a BOS.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return None
    with_special = list(tokenizer("a", verbose=False)["input_ids"])
    return int(bos) if with_special[:1] == [bos] and _encode(tokenizer, "a")[:1] != [bos] else None


def encode_texts(tokenizer: PreTrainedTokenizerBase, data: LoadedData) -> Tensor:
    """Return all texts as one stream of ids, `[tokens]` int64, with `SEPARATOR` between documents.

    Documents and separators are tokenised one by one, without special tokens.
    """
    texts = [document.text for document in data.documents if isinstance(document, Text)]
    separator = torch.tensor(_encode(tokenizer, SEPARATOR), dtype=torch.int64)
    pieces: list[Tensor] = []
    for start in range(0, len(texts), _BATCH):
        for ids in _encode_all(tokenizer, texts[start : start + _BATCH]):
            pieces += [separator, torch.tensor(ids, dtype=torch.int64)]
    return torch.cat(pieces[1:]) if pieces else torch.empty(0, dtype=torch.int64)


def encode_examples(tokenizer: PreTrainedTokenizerBase, data: LoadedData) -> list[EncodedExample]:
    """Return the examples or chats of `data` in order.

    Raises `DataError`: there are none, the tokenizer has no chat template, the template does not fit, or an answer has
    no tokens.
    """
    if not data.documents:
        raise DataError(f"{data.name} has no {data.kind}s; pass data with at least one.")
    bos = leading_bos(tokenizer)
    chats = [document for document in data.documents if isinstance(document, Chat)]
    texts = iter(_rendered(tokenizer, chats, data))
    encoded: list[EncodedExample] = []
    for number, document in enumerate(data.documents, start=1):
        at = f"{data.name}, {data.kind} {number}"
        if isinstance(document, Example):
            example = _encode_example(tokenizer, document, bos)
        elif isinstance(document, Chat):
            example = _encode_segments(tokenizer, _chat_segments(document, texts, at), [], [])
        else:
            raise DataError(f"{at}: is a text among examples; pass data of one kind.")
        if not any(example.carries_loss):
            raise DataError(f"{at}: the answer has no tokens; give it a text that this tokenizer keeps.")
        encoded.append(example)
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return _encode_all(tokenizer, [text])[0]


def _encode_all(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _encode_example(tokenizer: PreTrainedTokenizerBase, example: Example, bos: int | None) -> EncodedExample:
    """Return `[BOS] prompt answer [EOS]`, BOS and EOS where the tokenizer has them; answer and EOS carry loss.

    The white space at the joint: spaces that end the prompt belong to the answer, because tokenizers put a space
    into the word behind it; where there is none on either side, the answer gets one.
    """
    prompt = example.prompt.rstrip(" ")
    answer = example.prompt[len(prompt) :] + example.answer
    if not (prompt[-1:].isspace() or answer[:1].isspace()):
        answer = " " + answer
    eos = tokenizer.eos_token_id
    segments = [(prompt, False), (answer, True)]
    return _encode_segments(tokenizer, segments, [] if bos is None else [bos], [] if eos is None else [int(eos)])


def _encode_segments(
    tokenizer: PreTrainedTokenizerBase, segments: Sequence[tuple[str, bool]], before: list[int], after: list[int]
) -> EncodedExample:
    """Return the tokens of the segments behind one another; no token belongs to two of them. `after` carries loss."""
    token_ids, carries_loss, context = list(before), [False] * len(before), ""
    for text, loss in segments:
        ids = _continuation(tokenizer, context, text)
        token_ids += ids
        carries_loss += [loss] * len(ids)
        context += text
    token_ids += after
    carries_loss += [True] * len(after)
    return EncodedExample(token_ids, [False, *carries_loss[1:]])


def _continuation(tokenizer: PreTrainedTokenizerBase, context: str, text: str) -> list[int]:
    """Return the ids of `text` after `context`.

    Where the ids of the context begin those of both together, the rest of these: so tokenizers that mark the
    beginning of a text mark it once. Else a token would straddle the boundary, and `text` is tokenised alone.
    """
    if not context or not text:
        return _encode(tokenizer, text) if text else []
    head, whole = _encode_all(tokenizer, [context, context + text])
    if whole[: len(head)] == head and len(whole) > len(head):
        return whole[len(head) :]
    return _encode(tokenizer, text)


def _rendered(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], data: LoadedData) -> list[tuple[str, str]]:
    """Return what `rendered` gives for all that the segments of some chats are found by."""
    if chats and not getattr(tokenizer, "chat_template", None):
        number = next(n for n, document in enumerate(data.documents, start=1) if isinstance(document, Chat))
        raise DataError(
            f"{data.name}, {data.kind} {number}: this tokenizer has no chat template, so chats cannot be rendered; "
            "pass prompt and answer columns."
        )
    return rendered(
        tokenizer, [(chat.messages[:count], generate) for chat in chats for count, generate, _loss in _parts(chat)]
    )


def _parts(chat: Chat) -> Iterator[tuple[int, bool, bool]]:
    """Yield up to which message a chat is rendered, one after the other: how many there are, whether the beginning of
    an answer is put behind them, and whether what is then new carries loss."""
    for number, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            yield number, True, False
            yield number + 1, False, True
        elif number == len(chat.messages) - 1:
            yield number + 1, False, False


def _chat_segments(chat: Chat, texts: Iterator[tuple[str, str]], at: str) -> list[tuple[str, bool]]:
    """Return the rendered chat in pieces; those that an assistant writes (content and end of turn) carry loss.

    `texts` are what is rendered of its `_parts`, one by one.
    """
    segments: list[tuple[str, bool]] = []
    before = ""
    for count, generate, loss in _parts(chat):
        text, problem = next(texts, ("", f"it takes more than {SECONDS} seconds, or too much memory"))
        if problem:
            raise DataError(f"{at}: the chat template does not accept the messages ({problem}).")
        if not text.startswith(before):
            raise DataError(
                f"{at}: the chat template changes earlier turns when message {count + generate} is added, so it cannot "
                "be told which tokens are the answer; split the chat into chats with one assistant turn each."
            )
        segments.append((text[len(before) :], loss))
        before = text
    return segments
