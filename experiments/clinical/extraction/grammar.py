"""The JSON that a sentence may be answered with: a schema for each sentence, and its grammar by xgrammar.

Strings are runs of words of the sentence, so that a model can only point at what stands there; kinds that do not occur
are left out (Dong et al., XGrammar: flexible and efficient structured generation for large language models, 2024).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from extraction.terms import KINDS

MOST_WORDS, MOST_OF_A_KIND = 4, 4
_WORD = re.compile(r"\d+\.\d+\w*|\w+")
Strings = Annotated[list[str], Field(min_length=1, max_length=MOST_OF_A_KIND)]


class Findings(BaseModel):
    """What a sentence says that the patient has or takes."""

    model_config = ConfigDict(extra="forbid")

    disease: Strings = []
    medication: Strings = []
    dose: Strings = []
    route: Strings = []
    frequency: Strings = []
    symptom: Strings = []


def runs_of_words(sentence: str) -> list[str]:
    """Return every run of up to `MOST_WORDS` words with only spaces between them, once, in the sentence's order."""
    places = [match.span() for match in _WORD.finditer(sentence)]
    found: dict[str, None] = {}
    for first, (start, _) in enumerate(places):
        for last in range(first, min(len(places), first + MOST_WORDS)):
            if last > first and not sentence[places[last - 1][1] : places[last][0]].isspace():
                break
            found[sentence[start : places[last][1]]] = None
    return list(found)


def schema_of(sentence: str) -> dict[str, Any]:
    """Return the JSON schema of `Findings` whose strings are runs of words of the sentence."""
    strings = {"type": "array", "items": {"$ref": "#/$defs/run"}, "minItems": 1, "maxItems": MOST_OF_A_KIND}
    return {
        "type": "object",
        "properties": dict.fromkeys(KINDS, strings),
        "additionalProperties": False,
        "$defs": {"run": {"enum": runs_of_words(sentence)}},
    }


def grammars(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Any]:
    """Return a function from a sentence to its compiled grammar, for a model's vocabulary."""
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    return lambda sentence: compiler.compile_json_schema(json.dumps(schema_of(sentence)), any_whitespace=False)
