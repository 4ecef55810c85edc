"""Labelled texts and tagged words as token sequences, one example a sequence, padded to the longest.

Shapes: N examples, S tokens of the longest, L outputs of the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layer_surgery.data.documents import Labelled, LoadedData, Tagged
from layer_surgery.data.labels import label_number, label_set, numbers
from layer_surgery.data.objective import NO_LABEL, Objective
from layer_surgery.data.overlap import windows
from layer_surgery.data.tokens import PackedTokens, packed_tokens
from layer_surgery.errors import CheckpointError, DataError


@dataclass(frozen=True)
class _Encoded:
    token_ids: list[int]
    segments: list[int]
    answer: Any  # of a text its label; of words the label of each token
    around: tuple[int, int] = (0, 0)  # how many tokens before and behind words are not theirs


def pack_labelled(
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    *,
    sequence_length: int,
    chosen: Sequence[int],
    overlap: int | None = None,
) -> PackedTokens:
    """Pack the examples with these numbers, in this order. Nothing is cut off.

    With an `overlap`, tagged words that are too long for a sequence make several, one behind the other, which share so
    many tokens; each word has its tag in one of them only (`windows`), and `documents` of the result says whose they
    are.

    Texts get the tokens that the tokenizer puts around them; of two texts it says, where the model wants to know, which
    token is of which. Words are put together with spaces, as a model meets them, and the first token of each has its
    tag.

    Raises `DataError`: a label that the head does not have, an example that is too long, or an overlap that leaves no
    room in a window; `CheckpointError` where the model cannot tell padding.
    """
    of_words = objective.problem == "tags"
    answers = [_answer(each, objective, at) for each, at in _with_places(data)]
    encode = _encode_words if of_words else _encode_text
    if of_words and not tokenizer.is_fast:
        raise CheckpointError(
            "the tokenizer cannot say which tokens belong to which word, because it is not a fast one "
            "(tokenizer.json); save one with AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    examples = [encode(tokenizer, data.documents[number], answers[number]) for number in chosen]
    documents = None
    if overlap is None:
        _require_fit(data, examples, chosen, sequence_length, objective)
    else:
        limit = min(sequence_length, objective.longest or sequence_length)
        parts = [_in_windows(example, limit, overlap) for example in examples]
        documents = torch.tensor([place for place, part in enumerate(parts) for _ in part])
        examples = [window for part in parts for window in part]
    padding = _padding_id(tokenizer, objective, examples)
    length = max(2, *(len(example.token_ids) for example in examples))
    ids = torch.tensor([_padded(example.token_ids, padding, length) for example in examples])
    segments = torch.tensor([_padded(example.segments, 0, length) for example in examples])
    valid = torch.tensor([_padded([True] * len(example.token_ids), False, length) for example in examples])
    if of_words:
        labels = torch.tensor([_padded(example.answer, NO_LABEL, length) for example in examples])
        mask = labels != NO_LABEL
        if not mask.any():
            raise DataError(f"{data.name}: this tokenizer keeps none of the tagged words; give it words that it knows.")
    else:
        single = objective.problem == "single_label"
        labels = torch.tensor([example.answer for example in examples], dtype=torch.int64 if single else torch.float32)
        mask = torch.zeros_like(valid)
        mask[:, 0] = True
    packed = packed_tokens(
        data.name,
        ids,
        mask,
        valid,
        sum(len(example.token_ids) for example in examples),
        labels=labels,
        segments=segments if bool(segments.any()) else None,
    )
    return replace(packed, objective=objective, documents=documents)


def _with_places(data: LoadedData) -> list[tuple[Labelled | Tagged, str]]:
    found = []
    for number, document in enumerate(data.documents, start=1):
        if not isinstance(document, Labelled | Tagged):
            raise DataError(f"{data.name}, example {number}: has no label, but the model's head is a classifier.")
        found.append((document, f"{data.name}, example {number}"))
    return found


def _answer(document: Labelled | Tagged, objective: Objective, at: str) -> Any:
    if isinstance(document, Tagged):
        # As in data sets for the hub's token classifiers, -100 is no tag: the word carries no loss.
        return [NO_LABEL if tag == NO_LABEL else label_number(tag, objective, at) for tag in document.tags]
    if objective.problem == "multi_label":
        return label_set(document.label, objective, at)
    if objective.problem == "regression":
        return numbers(document.label, objective, at)
    if isinstance(document.label, list | tuple):
        raise DataError(
            f"{at}: has a list of labels, but the head gives one label a text; if it is meant to give several, set "
            '"problem_type": "multi_label_classification" in config.json.'
        )
    return label_number(document.label, objective, at)


def _encode_text(tokenizer: PreTrainedTokenizerBase, document: Any, answer: Any) -> _Encoded:
    texts = [document.text] if document.second is None else [document.text, document.second]
    encoded = tokenizer(*texts, truncation=False, padding=False, verbose=False)
    ids = list(encoded["input_ids"])
    segments = list(encoded["token_type_ids"]) if "token_type_ids" in encoded else [0] * len(ids)
    return _Encoded(ids, segments, answer)


def _encode_words(tokenizer: PreTrainedTokenizerBase, document: Any, answer: list[int]) -> _Encoded:
    text, starts = "", list[int]()
    for word in document.words:
        starts.append(len(text) + bool(text))
        text = f"{text} {word}" if text else word
    encoded = tokenizer(
        text,
        truncation=False,
        padding=False,
        verbose=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids, spans = list(encoded["input_ids"]), encoded["offset_mapping"]
    labels = [NO_LABEL] * len(ids)
    position = 0
    for start, word, label in zip(starts, document.words, answer, strict=True):
        # The first token that holds something of the word; those around the text are empty.
        while position < len(spans) and spans[position][1] <= max(start, spans[position][0]):
            position += 1
        if position < len(spans) and spans[position][0] < start + len(word):
            labels[position] = label
            position += 1
    special = encoded["special_tokens_mask"]
    own = special.index(0) if 0 in special else len(ids)
    return _Encoded(ids, [0] * len(ids), labels, (own, special[::-1].index(0) if 0 in special else 0))


def _in_windows(example: _Encoded, limit: int, overlap: int) -> list[_Encoded]:
    """Return a tagged example as it is if it fits, else its windows, each with the tokens that stand around a text."""
    if len(example.token_ids) <= limit:
        return [example]
    ids, (head, tail) = example.token_ids, example.around
    before, after = ids[:head], ids[len(ids) - tail :]
    own, labels = ids[head : len(ids) - tail], example.answer[head : len(ids) - tail]
    room = limit - len(before) - len(after)
    if not 0 <= overlap <= room // 2:
        raise DataError(
            f"--window-overlap is {overlap}, but a window of {limit} tokens has room for {max(0, room)} of a text; "
            f"allowed: {max(0, room // 2)} or less."
        )
    found: list[_Encoded] = []
    for window in windows(len(own), room, overlap):
        tags = [
            label if window.first <= place < window.last else NO_LABEL
            for place, label in enumerate(labels[window.start : window.end], start=window.start)
        ]
        if any(tag != NO_LABEL for tag in tags) or (window.last == len(own) and not found):
            token_ids = [*before, *own[window.start : window.end], *after]
            answer = [*[NO_LABEL] * head, *tags, *[NO_LABEL] * tail]
            found.append(_Encoded(token_ids, [0] * len(token_ids), answer))
    return found


def _require_fit(
    data: LoadedData, examples: list[_Encoded], chosen: Sequence[int], sequence_length: int, objective: Objective
) -> None:
    lengths = [len(example.token_ids) for example in examples]
    limit = min(sequence_length, objective.longest or sequence_length)
    if max(lengths) <= limit:
        return
    longest = max(range(len(lengths)), key=lambda place: lengths[place])
    too_long = sum(length > limit for length in lengths)
    of_model = limit < sequence_length or (objective.longest or lengths[longest]) < lengths[longest]
    allowed = f"the {objective.longest} that the model takes" if of_model else f"--sequence-length {sequence_length}"
    advice = "" if of_model else f"raise --sequence-length to at least {lengths[longest]}, "
    if objective.problem == "tags":
        advice += "read them in overlapping windows with --window-overlap, "
    advice += "or " if advice else ""
    raise DataError(
        f"{data.name}, example {chosen[longest] + 1} has {lengths[longest]:,} tokens, more than {allowed} "
        f"({too_long:,} of {len(examples):,} do not fit); {advice}shorten or split such examples: nothing is cut off."
    )


def _padding_id(tokenizer: PreTrainedTokenizerBase, objective: Objective, examples: list[_Encoded]) -> int:
    """Return the token to pad with: that by which the model tells padding."""
    if objective.padding_id is not None:
        return objective.padding_id
    if objective.of_sequences and len(examples) > 1:
        raise CheckpointError(
            "config.json has no pad_token_id, without which a classifier cannot tell where a text ends; set it to that "
            "of the tokenizer."
        )
    return int(tokenizer.pad_token_id or 0)


def _padded(values: list[Any], filling: Any, length: int) -> list[Any]:
    return [*values, *[filling] * (length - len(values))]


def count_labels(tokens: PackedTokens) -> Tensor:
    """Return how often each label of the head is the answer, [L] int64; of a regression nothing, [0]."""
    labels, objective = tokens.labels, tokens.objective
    if labels is None or objective.problem == "regression" or not objective.labelled:
        return torch.zeros(0, dtype=torch.int64)
    if objective.problem == "multi_label":
        return labels.sum(dim=0).long()
    return torch.bincount(labels[labels != NO_LABEL].flatten(), minlength=len(objective.labels))
