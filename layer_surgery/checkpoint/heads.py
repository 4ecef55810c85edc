"""Kinds of heads that there is a loss for, and what transformers calls them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from layer_surgery.checkpoint.architectures import longest_sequence
from layer_surgery.checkpoint.modeling_layer_surgery import HEADLESS, MODELS
from layer_surgery.data.objective import Objective, Problem

HeadKind = Literal["causal_lm", "masked_lm", "sequence_classification", "token_classification", "embedding"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A kind of head. Its name in the modelling file leads to transformers' class for each architecture."""

    kind: HeadKind
    entry: str  #: Name of its entry point in the modelling file.
    words: str  #: What it is called in sentences.
    pipeline: str  #: transformers' pipeline for it, which the hub takes for the task of a model.

    @property
    def auto_class(self) -> str:
        """Name of transformers' auto class."""
        return MODELS[self.entry][0]

    @property
    def stock_classes(self) -> Any:
        """transformers' classes with this head, by configuration class."""
        return MODELS[self.entry][1]

    @property
    def suffix(self) -> str:
        """How the names of transformers' classes with this head end."""
        return self.entry.removeprefix("LayerSurgery")


HEADS: dict[HeadKind, Head] = {
    head.kind: head
    for head in (
        Head(
            kind="causal_lm",
            entry="LayerSurgeryForCausalLM",
            words="causal language model",
            pipeline="text-generation",
        ),
        Head(kind="masked_lm", entry="LayerSurgeryForMaskedLM", words="masked language model", pipeline="fill-mask"),
        Head(
            kind="sequence_classification",
            entry="LayerSurgeryForSequenceClassification",
            words="sequence classifier",
            pipeline="text-classification",
        ),
        Head(
            kind="token_classification",
            entry="LayerSurgeryForTokenClassification",
            words="token classifier",
            pipeline="token-classification",
        ),
        # Stands behind transformers' model (`embedder.py`), so nothing in `config.json` names it.
        Head(kind="embedding", entry=HEADLESS, words="text embedding model", pipeline="feature-extraction"),
    )
}
CAUSAL_LM, EMBEDDING = HEADS["causal_lm"], HEADS["embedding"]


def base_class_of(config: Any) -> type:
    """Return the configuration class of the stock architecture, also for a checkpoint with low-rank layers."""
    base: type = getattr(config, "base_class", type(config))
    return base


def is_encoder(config: Any, head: Head) -> bool:
    """Return whether every token of the model sees all others: it has no use for a cache, and must be told of padding.

    Architectures that transformers has with a masked-LM head are such, unless they are causal language models here.
    """
    return head is not CAUSAL_LM and base_class_of(config) in MODEL_FOR_MASKED_LM_MAPPING


def named_head(config: Any, architectures: list[str]) -> Head | None:
    """Return the head, other than that of a causal LM, that the name of a class of `config.json` says; else None."""
    for head in HEADS.values():
        for name in architectures if head not in (CAUSAL_LM, EMBEDDING) else ():
            if name.endswith(head.suffix) and (
                base_class_of(config) in head.stock_classes or getattr(config, "auto_map", None)
            ):
                return head
    return None


def head_of_model(model: PreTrainedModel) -> Head | None:
    """Return the head of a model in memory; None if there is no loss for it."""
    classes, heads = set(type(model).__mro__), [head for head in HEADS.values() if head is not EMBEDDING]
    return next((head for head in heads if classes & {*head.stock_classes.values()}), None)


def objective_of(config: Any, head: Head, longest: int | None) -> Objective:
    """Return the problem that a head with this configuration solves, with the names of its labels."""
    problem = _problem(config, head)
    labels = label_names(config) if head.kind in ("sequence_classification", "token_classification") else ()
    padding = getattr(config, "pad_token_id", None)
    return Objective(problem=problem, labels=labels, padding_id=padding, longest=longest)


def _problem(config: Any, head: Head) -> Problem:
    if head.kind != "sequence_classification":
        problems: Mapping[HeadKind, Problem] = {
            "causal_lm": "next_token",
            "masked_lm": "masked_token",
            "embedding": "embedding",
        }
        return problems.get(head.kind, "tags")
    stated: Mapping[Any, Problem] = {
        "single_label_classification": "single_label",
        "multi_label_classification": "multi_label",
        "regression": "regression",
    }
    # transformers takes one output for a regression where the configuration does not say.
    unstated: Problem = "regression" if config.num_labels == 1 else "single_label"
    return stated.get(getattr(config, "problem_type", None), unstated)


def label_names(config: Any) -> tuple[str, ...]:
    """Return the names of the labels of a classifier, in the order of its outputs."""
    return tuple(str(config.id2label.get(number, number)) for number in range(config.num_labels))


def longest_input(config: Any, model: PreTrainedModel) -> int | None:
    """Return how many tokens a model takes at most; None where nothing says it.

    RoBERTa and its kin begin to count positions behind that of padding, so their table of positions is longer than
    the sequences.
    """
    limit = longest_sequence(config)
    for name, module in model.named_modules():
        first = getattr(module, "padding_idx", None)
        if name.endswith("embeddings.position_embeddings") and first is not None:
            rows = int(module.get_parameter("weight").shape[0]) - int(first) - 1
            return rows if limit is None else min(limit, rows)
    return limit
