"""A causal LM that writes what a sentence names as JSON, under a grammar: the teacher, and the causal path.

It is fine-tuned on the sentences of a few notes, with loss on the answers only; the same rows calibrate its
compression. Generation is greedy, under the sentence's own grammar: an answer is invalid only if it is not finished
within `MOST_TOKENS`, and then it counts as empty; and a string is not in the text only if it is given more often than
it stands there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from extraction.grammar import Findings, grammars
from extraction.notes import Note, Span
from extraction.tagger import train
from extraction.terms import KINDS
from layer_surgery.data.documents import Example, LoadedData
from layer_surgery.data.encoding import encode_examples

MOST_TOKENS, _BATCH_SIZE, _RATE = 96, 32, 1e-3
_SENTENCE = re.compile(r"[^.;]+(?:[.;](?!\s)[^.;]*)*(?:[.;]|$)")


@dataclass
class Answers:
    """What was written for some notes: their spans, and what could not be used."""

    spans: list[list[Span]]
    sentences: int
    invalid_json: int = 0
    not_in_the_text: int = 0  #: Strings that the sentence does not have, and that are left out.


def sentences_of(text: str) -> list[tuple[int, int]]:
    """Return where the sentences of a text begin and end, without the spaces around them; together they are all of it.

    A stop or semicolon ends a sentence where a space follows.
    """
    found = []
    for match in _SENTENCE.finditer(text):
        part = match.group()
        start = match.start() + len(part) - len(part.lstrip())
        end = match.end() - (len(part) - len(part.rstrip()))
        if start < end:
            found.append((start, end))
    return found


def prompt_for(sentence: str) -> str:
    """Return what the model is asked."""
    return f"Note: {sentence}\nJSON:\n"


def answer_for(text: str, spans: Sequence[Span], start: int, end: int) -> str:
    """Return the JSON of the spans within a sentence, kinds in the schema's order and strings in the text's."""
    inside = [span for span in sorted(spans) if start <= span.start and span.end <= end]
    named = {kind: [text[s.start : s.end] for s in inside if s.kind == kind] for kind in KINDS}
    return json.dumps({kind: strings for kind, strings in named.items() if strings})


def rows_of(notes: Sequence[Note]) -> list[Example]:
    """Return a prompt and an answer for each sentence."""
    return [
        Example(prompt_for(note.text[start:end]), answer_for(note.text, note.spans, start, end))
        for note in notes
        for start, end in sentences_of(note.text)
    ]


def write_rows(path: Path, rows: Sequence[Example]) -> None:
    """Write prompts and answers as `layer_surgery` reads them."""
    lines = [json.dumps({"prompt": row.prompt, "answer": row.answer}) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def fine_tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], *, steps: int, seed: int
) -> float:
    """Train the model on the answers; return the last steps' loss. It is changed in place."""
    encoded = encode_examples(tokenizer, LoadedData("rows", list(rows), "example"))
    features = [
        {
            "input_ids": each.token_ids,
            "labels": [t if loss else -100 for t, loss in zip(each.token_ids, each.carries_loss, strict=True)],
        }
        for each in encoded
    ]
    return train(model, features, DataCollatorForSeq2Seq(tokenizer), steps=steps, rate=_RATE, seed=seed)


@torch.no_grad()
def write_findings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, constrained: bool = True
) -> Answers:
    """Let the model write what each sentence names, and find that in the text; with no grammar if not `constrained`."""
    places = [(number, *place) for number, text in enumerate(texts) for place in sentences_of(text)]
    rows = [Example(prompt_for(texts[number][start:end]), "{}") for number, start, end in places]
    encoded = encode_examples(tokenizer, LoadedData("prompts", rows, "example"))
    prompts = [each.token_ids[: each.carries_loss.index(True)] for each in encoded]
    grammar_of = grammars(model, tokenizer) if constrained else None
    answers = Answers([[] for _ in texts], len(places))
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    for first in range(0, len(order), _BATCH_SIZE):
        chosen = order[first : first + _BATCH_SIZE]
        sentences = [texts[number][start:end] for number, start, end in (places[place] for place in chosen)]
        allowed = None if grammar_of is None else list(map(grammar_of, sentences))
        written = _generate(model, tokenizer, [prompts[place] for place in chosen], allowed)
        for place, answer in zip(chosen, written, strict=True):
            number, start, end = places[place]
            _take(answers, number, texts[number], start, end, answer)
    for spans in answers.spans:
        spans.sort()
    return answers


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], allowed: list[Any] | None
) -> list[str]:
    longest = max(map(len, prompts))
    padding = int(tokenizer.pad_token_id or 0)
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    processors = []
    if allowed is not None:
        import xgrammar

        processors = [xgrammar.contrib.hf.LogitsProcessor(allowed)]
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=MOST_TOKENS,
        do_sample=False,
        pad_token_id=padding,
        logits_processor=processors,
    )
    return [str(text) for text in tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)]


def _take(answers: Answers, number: int, text: str, start: int, end: int, written: str) -> None:
    """Add the spans of one answer: each string at its first place in the sentence that is not taken yet."""
    try:
        findings = Findings.model_validate_json(written)
    except ValidationError:
        answers.invalid_json += 1
        return
    taken: list[Span] = []
    for kind in KINDS:
        for string in getattr(findings, kind):
            span = _first_place(text, string, kind, start, end, taken)
            if span is None:
                answers.not_in_the_text += 1
            else:
                taken.append(span)
    answers.spans[number] += taken


def _first_place(text: str, string: str, kind: str, start: int, end: int, taken: Sequence[Span]) -> Span | None:
    place = text.find(string, start, end) if string.strip() else -1
    while place >= 0:
        span = Span(place, place + len(string), kind)
        if all(span.end <= other.start or other.end <= span.start for other in taken):
            return span
        place = text.find(string, place + 1, end)
    return None
