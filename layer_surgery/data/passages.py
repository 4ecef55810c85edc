"""Texts for embedding models: passages, one a sequence, with the tokens that the tokenizer puts around them.

Shapes: N passages, S tokens of the longest.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from layer_surgery.data.documents import LoadedData, Text
from layer_surgery.data.objective import Objective
from layer_surgery.data.tokens import PackedTokens, packed_tokens
from layer_surgery.errors import DataError

_PARAGRAPHS = re.compile(r"\n\s*\n")
_BATCH = 256  # texts given to the tokenizer at once


class Passage(NamedTuple):
    """One sequence."""

    ids: list[int]  #: With the prompt and what the tokenizer adds.
    text: str  #: Without them.


def passages(
    data: LoadedData, tokenizer: PreTrainedTokenizerBase, objective: Objective, *, sequence_length: int
) -> list[Passage]:
    """Return all passages of some texts, in their order.

    A text that fits into a sequence is one. Of one that does not, each paragraph is; and a paragraph that does not fit
    is cut at a token into pieces that do. So every text is whole or in pieces, and nothing is cut off.

    Raises `DataError` for data that are not texts, for an empty text, and for sequences that are too short for a
    prompt or longer than the model takes.
    """
    longest = min(objective.longest or sequence_length, tokenizer.model_max_length)
    if sequence_length > longest:
        raise DataError(
            f"--sequence-length is {sequence_length}, but the model takes at most {longest} tokens, and what is behind "
            "them is cut off wherever it is used; give less."
        )
    texts = list(_texts(data))
    found: list[Passage] = []
    for text, ids in zip(texts, _encoded(tokenizer, [objective.prompt + text for text in texts]), strict=True):
        if len(ids) <= sequence_length:
            found.append(Passage(ids, text))
            continue
        parts = [part.strip() for part in _PARAGRAPHS.split(text) if part.strip()]
        for part, whole in zip(parts, _encoded(tokenizer, [objective.prompt + part for part in parts]), strict=True):
            if len(whole) <= sequence_length:
                found.append(Passage(whole, part))
            else:
                found += _pieces(tokenizer, objective, part, whole, sequence_length)
    return found


def _texts(data: LoadedData) -> Iterator[str]:
    for number, document in enumerate(data.documents, start=1):
        if not isinstance(document, Text):
            raise DataError(
                f"{data.name} has {data.kind}s, but an embedding model is calibrated on texts; name the column with "
                "--text-column."
            )
        if not document.text.strip():
            raise DataError(f"{data.name}, text {number} is empty; remove it, or give it a text.")
        yield document.text


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        encoded = tokenizer(batch, truncation=False, padding=False, return_attention_mask=False, verbose=False)
        yield from (list(ids) for ids in encoded["input_ids"])


def _pieces(
    tokenizer: PreTrainedTokenizerBase, objective: Objective, text: str, whole: list[int], sequence_length: int
) -> Iterator[Passage]:
    """Cut a text, whose tokens behind the prompt are `whole`, and put the prompt and what the tokenizer adds around
    each piece."""
    around = next(
        _encoded(tokenizer, [objective.prompt.rstrip()])
    )  # a space at its end belongs to the text's first token
    # What is alike at both ends of any text with this prompt.
    begin = next((k for k, (a, b) in enumerate(zip(around, whole, strict=False)) if a != b), len(around))
    end = len(around) - begin
    if end and whole[-end:] != around[begin:]:
        raise DataError("the tokenizer changes a text when it puts special tokens around it, so texts cannot be cut.")
    body, room = whole[begin : len(whole) - end], sequence_length - len(around)
    if room < 1:
        raise DataError(
            f"--sequence-length is {sequence_length}, but the prompt and the tokenizer's own tokens take {len(around)} "
            "of each text; give more."
        )
    said = _text_of(tokenizer, objective, text, whole)
    for start in range(0, len(body), room):
        ids = [*whole[:begin], *body[start : start + room], *whole[len(whole) - end :]]
        yield Passage(ids, said(begin + start, begin + min(start + room, len(body))))


def _text_of(
    tokenizer: PreTrainedTokenizerBase, objective: Objective, text: str, whole: list[int]
) -> Callable[[int, int], str]:
    """Return a function from a first and a last token (excluded) of a text behind its prompt to what they say."""
    if not tokenizer.is_fast:
        return lambda first, last: str(tokenizer.decode(whole[first:last]))
    given = objective.prompt + text
    places = tokenizer(given, truncation=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return lambda first, last: given[places[first][0] : places[last - 1][1]].strip()


def pack_passages(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    found: Sequence[Passage],
    chosen: Sequence[int],
) -> PackedTokens:
    """Pack the passages with these numbers, in this order, padded on the right to the longest."""
    rows = [found[number].ids for number in chosen]
    if not rows or not all(rows):
        raise DataError(f"{data.name} has a text without any token; give it a text that this tokenizer keeps.")
    padding = next(int(i) for i in (objective.padding_id, tokenizer.pad_token_id, 0) if i is not None)
    ids = torch.full((len(rows), max(2, *map(len, rows))), padding)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        valid[number, : len(row)] = True
    mask = torch.zeros_like(valid)
    mask[:, 0] = True
    packed = packed_tokens(data.name, ids, mask, valid, sum(len(each.ids) for each in found))
    return replace(packed, objective=objective, texts=tuple(found[number].text for number in chosen))


def pack_as_used(
    name: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, objective: Objective, *, prompt: str
) -> tuple[PackedTokens, int]:
    """Pack each text behind a prompt as the model's users do, and return how many were too long and are cut off."""
    longest = min(objective.longest or tokenizer.model_max_length, tokenizer.model_max_length)
    given = [prompt + text for text in texts]
    cut = sum(len(ids) > longest for ids in _encoded(tokenizer, given))
    limit = {"truncation": True, "max_length": int(longest)} if cut else {"truncation": False}
    encoded = tokenizer(given, padding=False, return_attention_mask=False, verbose=False, **limit).input_ids
    rows = [Passage(list(ids), text) for ids, text in zip(encoded, texts, strict=True)]
    source = LoadedData(name, [Text(text) for text in texts], "text")
    return pack_passages(source, tokenizer, objective, rows, range(len(rows))), cut
