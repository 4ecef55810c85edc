"""Options that say how a result is healed: trained a little, so that it follows the original again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import attrs

from layer_surgery.config.choices import DATA_CHOICES, DEFAULT_EMBEDDING_LOSSES, DEFAULT_LOSSES, LOSS_CHOICES
from layer_surgery.config.declaring import Group, Options, about, at_least, maybe_names, names, one_of, path
from layer_surgery.config.keywords import check_type
from layer_surgery.errors import UserError, nearest_name

Trained: TypeAlias = Literal["all", "factors", "operated", "last", "head", "lora"]
TRAINED: tuple[Trained, ...] = ("all", "factors", "operated", "last", "head", "lora")
Stage: TypeAlias = Literal["local", "global"]
STAGES: tuple[Stage, ...] = ("local", "global")
LOCAL_ERRORS = ("fisher", "mse")
#: More than any result is healed on, and than there is memory for the order of.
_MOST_TOKENS = 10**12


@attrs.frozen(kw_only=True, slots=False)
class HealingConfig(Options):
    """How a result is healed. `compress` has the same options behind the prefix `--heal-`."""

    GROUP: ClassVar[Group] = "Healing"
    DEFAULT_MINUTES: ClassVar[float] = 10.0

    data: tuple[str, ...] = attrs.field(
        default=(),
        converter=names,
        metadata=about(
            "Text to heal on, named like calibration data, with weights where there are several; one window in eight "
            "(at most 64) is held out. Of examples and chats only the answers carry loss.",
            form="repeat",
            metavar="NAME|FILE[:WEIGHT]",
            choices=DATA_CHOICES,
        ),
    )
    minutes: float | None = attrs.field(
        default=None,
        metadata=about(
            "Time for all of it: the original's outputs, the probe of learning rates, and training.",
            metavar="M",
            default=f"{DEFAULT_MINUTES:g}, or as long as the number of tokens takes",
        ),
    )
    tokens: int | None = attrs.field(
        default=None,
        validator=at_least(1),
        metadata=about("Train on this many tokens instead; the same result on every run.", metavar="N"),
    )
    loss: tuple[str, ...] | None = attrs.field(
        default=None,
        converter=maybe_names,
        metadata=about(
            "What is made small (see below), with its weight; several add up. Or a YAML or JSON file with their "
            "options.",
            form="repeat",
            metavar="NAME[:WEIGHT]|FILE",
            choices=LOSS_CHOICES,
            default=f"{DEFAULT_LOSSES[0]}; of embedding models {', '.join(DEFAULT_EMBEDDING_LOSSES)}",
        ),
    )
    train: Trained = attrs.field(
        default="all",
        validator=one_of(TRAINED),
        metadata=about(
            "What is trained: all weights; factors (linears that the surgery made smaller); operated (layers that it "
            "changed, and those before a removed one); last (the last quarter of the layers and the head); head (the "
            "head alone); lora (adapters on all linears, merged at the end). Norms and biases are trained with each "
            "but the head. The head of an embedding model is the modules behind its transformer that have weights.",
            metavar="|".join(TRAINED),
        ),
    )
    lora_rank: int = attrs.field(
        default=16, validator=at_least(1), metadata=about("Rank of the adapters.", metavar="N")
    )
    learning_rate: float | None = attrs.field(
        default=None,
        metadata=about("Highest learning rate.", metavar="F", default="the best of a short probe"),
    )
    step_sequences: int = attrs.field(
        default=16, validator=at_least(1), metadata=about("Sequences in one step of the optimiser.", metavar="N")
    )
    general: float = attrs.field(
        default=0.25,
        metadata=about(
            "Sequences of general text (the bundled one) that are trained on, for each of the data; 0 for none.",
            metavar="F",
        ),
    )
    stages: tuple[str, ...] = attrs.field(
        default=("global",),
        converter=names,
        metadata=about(
            "local: each changed layer by itself, on the original's own inputs and outputs, in the memory of one layer "
            "of each model; global: the whole model on the original's outputs.",
            form="list",
            metavar="local,global",
        ),
    )
    local_error: str = attrs.field(
        default="fisher",
        validator=one_of(LOCAL_ERRORS),
        metadata=about(
            "How the local stage measures errors: in nats by the gradients of the original's loss, or as squares.",
            metavar="|".join(LOCAL_ERRORS),
        ),
    )
    teacher_cache: Path | None = attrs.field(
        default=None,
        converter=path,
        metadata=about(
            "Keep what the original says of the data here; another run on the same data takes it from there.",
            metavar="DIR",
        ),
    )
    teacher_rewrite: bool = attrs.field(
        default=False,
        metadata=about(
            "Have the original answer the prompts of the data first, whole in memory, and train on its answers. "
            "Answers that it does not end stay as they were."
        ),
    )
    both_models: bool = attrs.field(
        default=False,
        metadata=about(
            "Keep the original in memory beside the student and run it in each step, instead of asking it once before. "
            "The losses attention and stones need this."
        ),
    )
    gradient_checkpointing: bool = attrs.field(
        default=False, metadata=about("Compute activations twice instead of keeping them: less memory, more time.")
    )
    checkpoints: Path | None = attrs.field(
        default=None,
        converter=path,
        metadata=about("Keep checkpoints of the training here, to resume from.", metavar="DIR"),
    )
    resume: Path | None = attrs.field(
        default=None,
        converter=path,
        metadata=about("Go on from a checkpoint of the same training.", metavar="DIR/checkpoint-N"),
    )
    report_to: str = attrs.field(
        default="none",
        metadata=about("Tracker that transformers' Trainer knows, such as tensorboard.", metavar="NAME"),
    )

    def _check(self) -> None:
        if self.minutes is not None and self.tokens is not None:
            raise UserError("--minutes and --tokens both say how long to heal; give only one.")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UserError(f"--minutes is {self.minutes}; allowed: a number above 0.")
        if self.tokens is not None and self.tokens > _MOST_TOKENS:
            raise UserError(f"--tokens is {self.tokens:,}; allowed: at most {_MOST_TOKENS:,}.")
        if self.resume is not None and self.tokens is None:
            raise UserError("--resume goes on with a training of a fixed length; give the same --tokens as before.")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--learning-rate is {self.learning_rate}; allowed: a number above 0.")
        if not 0 <= self.general <= 1:
            raise UserError(f"--general is {self.general}; allowed: a fraction from 0 to 1.")
        if not self.stages or not set(self.stages) <= set(STAGES):
            raise UserError(f"--stages is '{','.join(self.stages)}'; allowed: {', '.join(STAGES)}, or both.")
        if self.both_models and "global" not in self.stages:
            raise UserError("--both-models is of the global stage, and --stages has only local; leave one of them out.")
        if self.both_models and self.teacher_cache is not None and not self.teacher_rewrite:
            raise UserError(
                "--both-models runs the original in each step, so there is nothing for --teacher-cache to keep; leave "
                "one of them out."
            )
        if self.loss is not None and not self.loss:
            raise UserError("--loss is empty; give a name such as kl, or leave it out.")

    @property
    def budget_minutes(self) -> float | None:
        """Minutes that healing may take; None where a number of tokens says when it ends."""
        return None if self.tokens is not None else self.minutes or self.DEFAULT_MINUTES


def healing(value: HealingConfig | Mapping[str, Any] | bool | None) -> HealingConfig | None:
    """Return the options of a healing that follows a compression: True takes the defaults, a mapping names some.

    Errors name the options as `compress` has them.
    """
    if value is None or value is False:
        return None
    if isinstance(value, HealingConfig):
        return value
    given = {} if value is True else dict(value)
    fields = {field.name: field for field in attrs.fields(HealingConfig)}
    try:
        for name, option in given.items():
            if name not in fields:
                raise UserError(f"--heal has no option '{name}'.{nearest_name(name, fields)}")
            check_type(fields[name], option)
        return HealingConfig(**given)
    except UserError as error:
        raise behind_prefix(error) from error


def behind_prefix(error: UserError) -> UserError:
    """Return an error that names the options of healing as `compress` has them."""
    own = "|".join(
        sorted((field.name.replace("_", "-") for field in attrs.fields(HealingConfig)), key=len, reverse=True)
    )
    return type(error)(re.sub(rf"--({own})\b", r"--heal-\1", str(error)))


@attrs.frozen(kw_only=True, slots=False)
class HealAfterwardsConfig(Options):
    """Whether healing follows a compression, and how."""

    GROUP: ClassVar[Group] = "Healing"

    heal: HealingConfig | None = attrs.field(
        default=None,
        converter=healing,
        metadata=about(
            "Heal the result: train it a little to follow the original. In Python, True or a dictionary of the options "
            "that follow, without their prefix.",
            inner=HealingConfig,
        ),
    )
