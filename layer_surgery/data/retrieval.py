"""Queries, and the passages that answer them: what retrieval by vectors is measured on."""

import json
from dataclasses import dataclass

from layer_surgery.data.bundled import bundled_retrieval


@dataclass(frozen=True)
class RetrievalSet:
    """Which of some passages belong to each query; a passage either does or does not."""

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    relevant: tuple[frozenset[int], ...]  #: For each query, the indices of its documents; at least one.
    groups: tuple[int, ...]  #: For each query, the text it is from: queries of one text are not independent.


def bundled_retrieval_sets() -> tuple[RetrievalSet, ...]:
    """Return the bundled sets, `passage` and `text`: the same queries and documents.

    A query is the first sentence of a paragraph. In `passage` the rest of this paragraph is to be found, in `text` all
    passages of the text that it is from; see calibration_data/README.md for what this tells. Raises `DataError` if the
    files are not as their manifest says.
    """
    folder = bundled_retrieval()
    queries, passages = (
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("queries.jsonl", "passages.jsonl")
    )
    places = {passage["id"]: place for place, passage in enumerate(passages)}
    texts = [_text(passage["id"]) for passage in passages]
    names = sorted(set(texts))
    own = [_text(query["passage"]) for query in queries]
    same_text = {
        name: frozenset(place for place, text in enumerate(texts) if text == name) for name in dict.fromkeys(own)
    }
    relevant = {
        "passage": tuple(frozenset({places[query["passage"]]}) for query in queries),
        "text": tuple(same_text[name] for name in own),
    }
    return tuple(
        RetrievalSet(
            name=name,
            queries=tuple(query["query"] for query in queries),
            documents=tuple(passage["text"] for passage in passages),
            relevant=wanted,
            groups=tuple(names.index(text) for text in own),
        )
        for name, wanted in relevant.items()
    )


def _text(passage: str) -> str:
    """Return the name of the text that a passage is from."""
    return passage.rpartition("/")[0]
