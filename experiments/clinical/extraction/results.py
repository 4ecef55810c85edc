"""What a run came to, as plain data: scores, differences, speed, cost, and what was invalid."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import layer_surgery
from extraction import json_labeller, tagger
from extraction.scores import CONFIDENCE, RESAMPLES, difference, score, seqeval_f1
from extraction.speed import cost_per_thousand, documents_per_second
from extraction.stages import LABELLERS, LLM_KEEP, LLM_LAYERS, TAGGER_LAYERS, Recipe, load_tagger
from extraction.tags import tags_of

SETS = ("test", "external")


def results(recipe: Recipe, price_per_hour: float, *, causal: bool) -> dict[str, Any]:
    """Make whatever is not made yet, and return what all of it came to; the causal LM is compressed if `causal`."""
    gold_tagger = recipe.trained("gold", lambda: recipe.gold("train"))
    distilled = recipe.trained("distilled", lambda: recipe.teacher("train"))
    compressed = recipe.compressed(distilled)
    taggers = {
        "gold": gold_tagger,
        "distilled": distilled,
        "compressed": compressed,
        "healed": recipe.healed(compressed),
    }
    best, table = recipe.choice
    return {
        "data": "SYNTHETIC notes from a seeded generator; no note is of a person, or from a record",
        "seed": recipe.seed,
        "size": vars(recipe.size),
        "notes": {name: _described(recipe, name) for name in recipe.notes},
        "encoder": tagger.SIZES | {"window": tagger.WINDOW, "overlap": tagger.OVERLAP},
        "layers": {"compressed": TAGGER_LAYERS, "llm-compressed": {"whole": LLM_LAYERS, "keep": LLM_KEEP}},
        "bootstrap": {"over": "documents", "resamples": RESAMPLES, "confidence": CONFIDENCE},
        "labellers": LABELLERS,
        "unions": table,
        "best_unions": best,
        "training_labels": score(recipe.gold("train"), recipe.teacher("train"), recipe.seed),
        "f1": _scores(recipe, taggers),
        "differences": _differences(recipe, taggers),
        "speed": _speed(recipe, taggers, price_per_hour),
        "causal": _causal(recipe) if causal else None,
    }


def _described(recipe: Recipe, name: str) -> dict[str, Any]:
    notes = recipe.notes[name]
    digest = hashlib.sha256(repr([(note.text, note.spans) for note in notes]).encode()).hexdigest()
    return {
        "notes": len(notes),
        "spans": sum(len(note.spans) for note in notes),
        "families": sorted({note.family for note in notes}),
        "longer_than_a_window": _longer(recipe, name),
        "sha256": digest,
    }


def _longer(recipe: Recipe, name: str) -> int:
    packed = tagger.pack(recipe.texts(name), None, recipe.tokenizer())
    assert packed.documents is not None
    return int((packed.documents.bincount() > 1).sum())


def _scores(recipe: Recipe, taggers: dict[str, Path]) -> dict[str, Any]:
    """Return F1 of every tagger on both sets; strict F1 of all kinds has to be that of seqeval."""
    found: dict[str, Any] = {}
    for name in SETS:
        texts, gold = recipe.texts(name), recipe.gold(name)
        tagged = list(map(tags_of, texts, gold))
        found[name] = {}
        for tag, model in taggers.items():
            given = recipe.found(model, name)
            found[name][tag] = score(gold, given, recipe.seed)
            by_seqeval, ours = (
                seqeval_f1(tagged, list(map(tags_of, texts, given))),
                found[name][tag]["all"]["strict"]["f1"],
            )
            if abs(by_seqeval - ours) > 1e-4:
                raise AssertionError(f"strict F1 of '{tag}' on '{name}' is {ours}, but {by_seqeval} by seqeval")
    return found


def _differences(recipe: Recipe, taggers: dict[str, Path]) -> dict[str, Any]:
    """Return strict F1 of every tagger less that of the distilled one, in pairs over documents."""
    return {
        name: {
            tag: difference(
                recipe.gold(name), recipe.found(taggers["distilled"], name), recipe.found(model, name), recipe.seed
            )
            for tag, model in taggers.items()
            if tag != "distilled"
        }
        for name in SETS
    }


def _speed(recipe: Recipe, taggers: dict[str, Path], price_per_hour: float) -> dict[str, Any]:
    """Return documents per second on the inner test set: ratios to the distilled tagger, and costs."""
    tokenizer, texts = recipe.tokenizer(), recipe.texts("test")
    loaded = {tag: load_tagger(model) for tag, model in taggers.items() if tag != "gold"}
    runs = {tag: partial(tagger.find, model, tokenizer, texts) for tag, model in loaded.items()}
    rates = documents_per_second(runs, len(texts), recipe.size.repeats)
    few = texts[: min(4, len(texts))]
    llm, llm_tokenizer = (
        layer_surgery.load(recipe.fine_tuned(), dtype=torch.float32).eval(),
        _tokenizer(recipe.fine_tuned()),
    )
    rates |= documents_per_second({"llm": partial(json_labeller.write_findings, llm, llm_tokenizer, few)}, len(few), 1)
    return {
        "documents": len(texts),
        "documents_of_the_llm": len(few),
        "threads": torch.get_num_threads(),
        "price_per_hour": price_per_hour,
        "documents_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "times_the_distilled": {name: round(rate / rates["distilled"], 3) for name, rate in rates.items()},
        "cost_per_1000": {name: round(cost_per_thousand(rate, price_per_hour), 6) for name, rate in rates.items()},
    }


def _causal(recipe: Recipe) -> dict[str, Any]:
    """Return F1 and invalid answers of the causal LM before and after compression, and without a grammar."""
    count = recipe.size.written
    gold = recipe.gold("test")[:count]
    before = recipe.fine_tuned()
    after = recipe.compressed_llm(before)
    written = {
        "llm": recipe.written(before, "test", count),
        "llm, compressed": recipe.written(after, "test", count),
        "llm, without a grammar": recipe.written(before, "test", count, constrained=False),
    }
    rows = {
        name: {key: value for key, value in answers.items() if key != "spans"}
        | {"f1": score(gold, answers["spans"], recipe.seed)}
        for name, answers in written.items()
    }
    change = difference(gold, written["llm"]["spans"], written["llm, compressed"]["spans"], recipe.seed)
    asked = [name for name in ("choice", "train") if name == "choice" or recipe.asks_the_llm]
    labelling = {name: recipe.written(before, name) for name in asked}
    return {
        "notes": count,
        "models": rows,
        "compressed_less_llm": change,
        "labelling": {
            name: {key: answers[key] for key in ("sentences", "invalid_json", "not_in_the_text")}
            for name, answers in labelling.items()
        },
    }


def _tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)
