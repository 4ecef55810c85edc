"""What a healing asks of its options and its text, before anything is computed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.heads import CAUSAL_LM, EMBEDDING
from layer_surgery.config import HealingConfig
from layer_surgery.config.choices import DEFAULT_EMBEDDING_LOSSES, DEFAULT_LOSSES
from layer_surgery.config.inputs import TextConfig
from layer_surgery.data import load_documents, pack_evaluation
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.disk.folders import check_folder
from layer_surgery.errors import CheckpointError, DataError, UserError
from layer_surgery.healing.adapters import check_peft
from layer_surgery.healing.attention_maps import compared_layers
from layer_surgery.healing.mixture import WeightedLoss, parse_losses
from layer_surgery.healing.outputs import check_losses
from layer_surgery.healing.relations import check_relations
from layer_surgery.healing.resuming import check_training_checkpoint
from layer_surgery.healing.rewrite import prompts
from layer_surgery.healing.trainable import adapter_targets, check_head
from layer_surgery.healing.windows import HealingData, healing_data, most_held_out
from layer_surgery.runs.bench import GENERAL_TEXT
from layer_surgery.runs.healing.beside import check_beside
from layer_surgery.runs.healing.resuming import check_resumed, options_identity
from layer_surgery.runs.healing.teachers import Teachers
from layer_surgery.runs.provenance import described_tokens
from layer_surgery.runs.session import Session

#: Fewest texts of which some are more alike than others.
_FEWEST_COMPARED = 3
#: Most windows that are packed where minutes are the budget: how many will be used is known only after the probe.
_MOST_WINDOWS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class PreparedHealing:
    """A healing whose options and data have been checked. Nothing has been computed yet."""

    config: HealingConfig
    losses: tuple[WeightedLoss, ...]
    data: HealingData
    described: dict[str, object]  #: The data, for the record.
    identity: dict[str, Any]  #: What options and data say that the training is of.
    teachers: Teachers | None = None  #: Of an embedding model with others than the original.

    @property
    def kept_temperature(self) -> float | None:
        """The temperature at which the original's largest probabilities are kept; None if a loss needs the others."""
        losses = [loss for loss in self.losses if loss.entry.needs == "logits"]
        found = {loss.settings.get("temperature", 1.0) for loss in losses}
        return found.pop() if len(found) == 1 and all("top_k" in loss.entry.teachers for loss in losses) else None


def prepare_healing(
    session: Session,
    config: HealingConfig,
    text: TextConfig,
    option: str = "--data",
    *,
    fewer_dimensions: bool = False,
    teacher: Checkpoint | None = None,
    teachers: Teachers | None = None,
    parameters: int | None = None,
) -> PreparedHealing:
    """Load the text and check the options, before any work is done.

    Args:
        session: of the original or the result, whose tokenizers are the same.
        text: length of the sequences, and column.
        option: what errors call the option that names the text.
        fewer_dimensions: whether the embeddings of the result have fewer numbers than those of the original.
        teacher: the original, where the session is the result's.
        teachers: of an embedding model, where they are others than the original alone.
        parameters: of the result, where the session is the original's.

    Raises `UserError` for what cannot be done.
    """
    original = session.checkpoint
    objective = original.objective
    if config.teacher_rewrite and original.head is not CAUSAL_LM:
        raise CheckpointError(
            f"--teacher-rewrite has a causal language model write answers, but {original.name} is a "
            f"{original.head.words}; leave it out."
        )
    unlike = fewer_dimensions or teachers is not None
    losses = parse_losses(config.loss if config.loss is not None else _default_losses(original, unlike))
    check_losses(losses, objective)
    check_beside(losses, config, session, teacher or original, parameters or original.parameters)
    check_relations(losses, original)
    if any(loss.entry.needs == "attention" for loss in losses):
        compared_layers(original, original, range(original.layer_count))
    _check_vectors(losses, config, fewer_dimensions, teachers)
    _check_processes(config)
    if config.train == "lora":
        if "local" in config.stages:
            raise UserError("--train lora puts adapters on the whole model; leave out --stages local.")
        check_peft()
        adapter_targets(session.checkpoint.skeleton, session.checkpoint.architecture.layers)
    if config.train == "head" and not fewer_dimensions:  # which come with a module of their own
        check_head(original)
    check_folder(config.teacher_cache, "--teacher-cache")
    check_folder(config.checkpoints, "--checkpoints")
    if config.resume is not None:
        check_training_checkpoint(config.resume)
    windows = _MOST_WINDOWS
    if config.tokens is not None and not objective.apart:  # else they are as long as they are
        windows = max(1, math.ceil(config.tokens / text.sequence_length))
    tokens = session.healing_tokens(config.data, text, windows + most_held_out(objective), option)
    data = healing_data(tokens, _general_text(session, config, tokens), config.general, session.runtime.seed)
    parallel.agree(
        {f"other tokens of '{tokens.name}' (sha256)": data.train.sha256},
        "give all processes the same text and tokenizer",
    )
    described = described_tokens(tokens) or {}
    if config.teacher_rewrite and not prompts(data.train, stop_tokens(session)):
        raise DataError(
            f"--teacher-rewrite finds no prompts in {tokens.name} (one with one answer, which the tokenizer ends with "
            "an end-of-text token); leave it out, or pass rows with prompt and answer."
        )
    identity = options_identity(session, config, losses, data)
    if teachers is not None:
        identity["--teacher (sha256)"] = [*["the original"] * teachers.with_original, *teachers.sha256]
    if config.resume is not None:
        check_resumed(config.resume, identity)
    return PreparedHealing(
        config=config, losses=losses, data=data, described=described, identity=identity, teachers=teachers
    )


def _default_losses(original: Checkpoint, unlike: bool) -> tuple[str, ...]:
    """Return the losses that a model is healed by unless the user names some; `unlike` says that the vectors of an
    embedding model are not in its teachers' space."""
    if original.head is not EMBEDDING:
        return DEFAULT_LOSSES
    return DEFAULT_EMBEDDING_LOSSES[1:] if unlike else DEFAULT_EMBEDDING_LOSSES


def _check_vectors(
    losses: Sequence[WeightedLoss], config: HealingConfig, fewer_dimensions: bool, teachers: Teachers | None
) -> None:
    """Raise `UserError` for losses between embeddings that cannot be computed."""
    if teachers is not None and "local" in config.stages:
        raise UserError("--stages local has layers follow the original's alone; leave it out, or give one --teacher.")
    for loss in losses:
        if loss.name == "embedding_cosine" and not loss.settings["projected"] and (teachers or fewer_dimensions):
            others = "those of several teachers side by side, which are in another space"
            whose = others if teachers is not None else "the original's, which has more numbers"
            raise UserError(
                f"--loss {loss.name} compares each embedding with {whose}; leave it out and take embedding_similarity "
                "and embedding_relative, or give embedding_cosine:10:projected=1."
            )
        if loss.entry.needs == "vectors" and config.step_sequences < _FEWEST_COMPARED:
            raise UserError(
                f"--step-sequences is {config.step_sequences}, but --loss {loss.name} compares the texts of a step "
                f"with each other; allowed: {_FEWEST_COMPARED} or more."
            )


def _check_processes(config: HealingConfig) -> None:
    """Raise `UserError` for what several processes cannot do together."""
    world = parallel.group().world
    for variable, option in (("ACCELERATE_USE_FSDP", "--use_fsdp"), ("ACCELERATE_USE_DEEPSPEED", "--use_deepspeed")):
        if os.environ.get(variable, "").lower() in ("true", "1"):
            raise UserError(
                f"healing keeps the whole student in each process, but accelerate was told {option}; leave that out of "
                "its command and configuration."
            )
    if "local" in config.stages:
        parallel.check_alone("--stages local")
    if config.step_sequences % world:
        raise UserError(
            f"--step-sequences is {config.step_sequences}, which {world} processes cannot share evenly; take a "
            f"multiple of {world}."
        )


def stop_tokens(session: Session) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's, and those that the model's configuration names."""
    named = getattr(session.checkpoint.config, "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return {int(token) for token in [*found, session.need_tokenizer().eos_token_id] if token is not None}


def _general_text(session: Session, config: HealingConfig, tokens: PackedTokens) -> PackedTokens | None:
    """Return the bundled text in windows; None if none is wanted, or the data have it already.

    None for classifiers, which are made for one kind of text and learn from labels.
    """
    if not config.general or tokens.objective.labelled or any(source.name == GENERAL_TEXT for source in tokens.sources):
        return None
    text = load_documents(GENERAL_TEXT, part="calibration")
    return pack_evaluation(
        text,
        session.need_tokenizer(),
        sequence_length=tokens.sequence_length,
        objective=tokens.objective,
        seed=session.runtime.seed,
    )
