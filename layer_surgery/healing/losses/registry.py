"""The registry of losses: each a function over logits or states, with its source and its options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from torch import Tensor

from layer_surgery.config.choices import LOSS_CHOICES
from layer_surgery.errors import UserError, nearest_name
from layer_surgery.healing.losses.inputs import TeacherKind
from layer_surgery.registry import Registry

Needs = Literal["labels", "logits", "states", "vectors", "attention", "relations", "stones"]
"""What a loss is a function of: `TokenLogits` without a teacher; with one; a sequence of `StatePair`;
`VectorPair`; a sequence of `AttentionPair` or of `RelationPair`; `Stones`."""
PER_TOKEN: tuple[Needs, ...] = ("labels", "logits", "stones")
"""Needs of the losses that return nats for each token [n]; the others return one mean."""


#: Why a loss may refuse a kind of teacher.
_UNDEFINED: dict[TeacherKind, str] = {
    "dense": "is for sparse teachers",
    "top_k": "needs the teacher's whole distribution, and only its top tokens and the mass of the others are kept",
    "sampled": "is not linear in the teacher's probabilities, and only a sample drawn from them is kept",
}


@dataclass(frozen=True)
class Interval:
    """Numbers that an option may be."""

    low: float
    high: float = math.inf
    ends: Literal["[]", "[)", "(]", "()"] = "[]"  #: Whether an end belongs to it, as in mathematics.
    whole: bool = False  #: Whether only whole numbers do.

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return above and below and math.isfinite(value) and (value.is_integer() or not self.whole)

    def __str__(self) -> str:
        low = f"{self.low:g} or more" if self.ends[0] == "[" else f"above {self.low:g}"
        low = f"a whole number, {low}" if self.whole else low
        if self.high == math.inf:
            return low
        return f"{low}, {'at most' if self.ends[1] == ']' else 'below'} {self.high:g}"


POSITIVE = Interval(0, ends="()")
NOT_NEGATIVE = Interval(0, ends="[)")
OPEN_UNIT = Interval(0, 1, "()")


@dataclass(frozen=True)
class Arranged:
    """An option that the student sees to, before the function of a loss is called."""

    default: float
    allowed: Interval


@dataclass(frozen=True)
class LossEntry:
    """A loss that can be chosen by name. Its options are the keyword-only arguments of the function, and those that say
    what it is called with."""

    function: Callable[..., Tensor]
    name: str
    _: KW_ONLY
    needs: Needs
    teachers: tuple[TeacherKind, ...] = ("dense",)  #: The kinds of teacher that it is defined for; () needs none.
    allowed: Mapping[str, Interval] = field(default_factory=dict)  #: Of its options that are numbers.
    arranged: Mapping[str, Arranged] = field(default_factory=dict)
    """Options that are not the function's: they say how what it looks at is made."""
    across_tokens: bool = False
    """Whether a token's value depends on the other tokens of the chunk, so that the sum depends on the chunks."""

    def __post_init__(self) -> None:
        if set(self.allowed) != set(self.own_options):
            raise ValueError(f"the loss '{self.name}' has options without an interval, or the other way round")

    @property
    def source(self) -> str:
        """URL of the paper, or "" where there is none."""
        return LOSS_CHOICES[self.name].source

    @property
    def options(self) -> dict[str, float]:
        """The default of each option, by name."""
        return self.own_options | {name: option.default for name, option in self.arranged.items()}

    @property
    def own_options(self) -> dict[str, float]:
        """Those of the function."""
        arguments = inspect.signature(self.function).parameters.values()
        return {each.name: each.default for each in arguments if each.kind is inspect.Parameter.KEYWORD_ONLY}

    def check_teacher(self, kind: TeacherKind) -> None:
        """Raise `UserError` if the loss is not defined for this kind of teacher."""
        if self.teachers and kind not in self.teachers:
            raise UserError(
                f"the loss '{self.name}' {_UNDEFINED[kind]}; run the teacher beside the student, or take another loss "
                f"({', '.join(other.name for other in LOSSES if kind in other.teachers)})."
            )

    def check(self, options: Mapping[str, Any], place: str) -> dict[str, float]:
        """Return options as numbers. Raises `UserError` for one that the loss does not have, or out of range.

        Args:
            options: values by name.
            place: what the message calls the place where they are from, as `--loss kl:1`.
        """
        found: dict[str, float] = {}
        allowed = {**self.allowed, **{name: option.allowed for name, option in self.arranged.items()}}
        for name, value in options.items():
            if name not in allowed:
                known = ", ".join(allowed) or "none"
                raise UserError(
                    f"{place}: the loss '{self.name}' has no option '{name}'."
                    f"{nearest_name(name, allowed)} It has: {known}."
                )
            number = as_number(value)
            if number is None or number not in allowed[name]:
                raise UserError(f"{place}: '{name}' is {value!r}; allowed: {allowed[name]}.")
            found[name] = number
        return found


def as_number(value: Any) -> float | None:
    """Return a number, or a text that is one, as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


LOSSES = Registry("loss", LossEntry, LOSS_CHOICES)
