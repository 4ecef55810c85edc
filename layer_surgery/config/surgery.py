"""Options that say which layers are operated on, how, and what may stay of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import attrs

from layer_surgery.config.choices import (
    COMPONENT_CHOICES,
    DEFAULT_LOSSES,
    LOSS_CHOICES,
    METHOD_CHOICES,
    SCORER_CHOICES,
    Choice,
)
from layer_surgery.config.declaring import (
    Group,
    Options,
    about,
    about_of,
    at_least,
    maybe_names,
    maybe_whole_numbers,
    one_of,
)
from layer_surgery.errors import PlanError, UserError
from layer_surgery.records.plan import PARTS, REFIT_SCOPES, Part, RefitScope, SurgeryPlan

DEFAULT_METHOD = "mix"
DEFAULT_SCORER = "fisher"
#: Kinds that the search may cut, and those that it cuts unless the user names others.
COMPONENTS = tuple(COMPONENT_CHOICES)
DEFAULT_COMPONENTS = ("channels", "singular", "experts")
#: Those that all layers can have as many of as the configuration says.
UNIFORM_COMPONENTS = ("channels", "heads", "experts", "routed")
#: What help texts list below all options: the option, the heading, the names, and those that are the default.
LISTED_BELOW: tuple[tuple[str, str, Mapping[str, Choice], tuple[str, ...]], ...] = (
    ("scorer", "Scorers", SCORER_CHOICES, (DEFAULT_SCORER,)),
    ("method", "Methods", METHOD_CHOICES, (DEFAULT_METHOD,)),
    ("components", "Components", COMPONENT_CHOICES, DEFAULT_COMPONENTS),
    ("loss", "Losses", LOSS_CHOICES, DEFAULT_LOSSES),
    ("heal__loss", "Losses to heal by", LOSS_CHOICES, DEFAULT_LOSSES),
)


@dataclass(frozen=True)
class GivenPlan:
    """A plan of the user's, and what errors call it."""

    plan: SurgeryPlan
    name: str

    def to_dict(self) -> dict[str, Any]:
        return self.plan.to_dict()


def _given_plan(value: str | Path | SurgeryPlan | dict[str, Any] | GivenPlan | None) -> GivenPlan | None:
    if value is None or isinstance(value, GivenPlan):
        return value
    if isinstance(value, str | Path):
        return GivenPlan(SurgeryPlan.read(Path(value)), f"--plan {value}")
    plan = value if isinstance(value, SurgeryPlan) else SurgeryPlan.from_dict(value)
    return GivenPlan(plan, "the given plan")


def check_keep(_instance: Any, _field: Any, value: Any) -> None:
    """Check a kept fraction, or several."""
    for keep in value if isinstance(value, tuple) else (value,):
        if keep is not None and not (math.isfinite(keep) and 0 <= keep <= 1):
            raise PlanError(f"--keep is {keep}; allowed: a fraction from 0 (remove outright) to 1.")


def _check_target(_instance: Any, field: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        option = about_of(field).option(field.name)
        raise PlanError(f"{option} is {value}; allowed: a fraction above 0, up to 1.")


@attrs.frozen(kw_only=True, slots=False)
class PartConfig(Options):
    """Which part of each layer is operated on."""

    GROUP: ClassVar[Group] = "Surgery"

    remove: Part = attrs.field(
        default="layer",
        validator=one_of(PARTS, PlanError),
        metadata=about(
            "Operate on whole layers, or only on their attention or their MLP; the budget is then of these.",
            choices=PARTS,
        ),
    )


@attrs.frozen(kw_only=True, slots=False)
class BudgetConfig(PartConfig):
    """Which layers are operated on, and how many parameters may stay in them."""

    GROUP: ClassVar[Group] = "Budget"
    DEFAULT_KEEP: ClassVar[float] = 0.1

    target_layers: int | None = attrs.field(default=None, metadata=about("Number of layers left whole.", metavar="N"))
    keep: float | None = attrs.field(
        default=None,
        validator=check_keep,
        metadata=about(
            "Fraction of the other layers' parameters to spend on low-rank components, 0 to 1; 0 removes the layers "
            "outright.",
            metavar="F",
            default=f"{DEFAULT_KEEP}",
        ),
    )
    target_parameters: float | None = attrs.field(
        default=None,
        validator=_check_target,
        metadata=about(
            "The same budget as a fraction of all the model's parameters, instead of --keep. Alone, "
            "without the number of layers, this and the other targets have all layers take part.",
            metavar="F",
        ),
    )
    target_size: int | None = attrs.field(
        default=None,
        validator=at_least(1),
        metadata=about("The same budget as the size of the saved tensors, such as 500MB.", metavar="SIZE", form="size"),
    )
    target_flops: float | None = attrs.field(
        default=None,
        validator=_check_target,
        metadata=about(
            "Operations of a generated token, as a fraction of the original's, behind --sequence-length tokens.",
            metavar="F",
        ),
    )
    target_kv_cache: float | None = attrs.field(
        default=None,
        validator=_check_target,
        metadata=about("Bytes of a token in the KV cache, as a fraction of the original's.", metavar="F"),
    )
    target_time: float | None = attrs.field(
        default=None,
        validator=_check_target,
        metadata=about(
            "Time that the weights take for a generated token on this machine, as a fraction of the original's; "
            "measured before the search.",
            metavar="F",
        ),
    )
    layers: tuple[int, ...] | None = attrs.field(
        default=None,
        converter=maybe_whole_numbers,
        metadata=about(
            "The layers to operate on, counted from 0, instead of the scorer's choice.",
            form="list",
            metavar="I,J,...",
            items="layer numbers",
            example="3,5,7",
        ),
    )

    @property
    def other_targets(self) -> dict[str, float]:
        """What is asked for in other resources than parameters, by the name of the option."""
        named = {name: getattr(self, name) for name in ("target_flops", "target_kv_cache", "target_time")}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def of_all_layers(self) -> bool:
        """Whether targets for the whole model are all that is said, so that every layer takes part."""
        targets = (self.target_parameters, self.target_size, *self.other_targets.values())
        return self.target_layers is None and self.layers is None and any(target is not None for target in targets)

    def _check(self) -> None:
        if self.keep is not None and self.target_parameters is not None:
            raise PlanError("--keep and --target-parameters are the same budget in two units; give only one of them.")
        if self.target_size is not None and (self.keep, self.target_parameters) != (None, None):
            other = "--keep" if self.keep is not None else "--target-parameters"
            raise PlanError(f"--target-size and {other} are the same budget in two units; give only one of them.")
        if self.layers is not None:
            repeated = sorted({index for index in self.layers if self.layers.count(index) > 1})
            if not self.layers or repeated:
                raise PlanError(
                    f"--layers must name each layer once; {f'repeated: {repeated}' if repeated else 'none given'}."
                )


@attrs.frozen(kw_only=True, slots=False)
class ChoiceConfig(Options):
    """Who chooses the layers, and what takes their place."""

    GROUP: ClassVar[Group] = "Surgery"

    scorer: str = attrs.field(
        default=DEFAULT_SCORER,
        metadata=about("How layers are ranked (see below).", metavar="NAME", default="", choices=SCORER_CHOICES),
    )
    method: str | None = attrs.field(
        default=None,
        metadata=about("How low-rank components are made (see below).", metavar="NAME", choices=METHOD_CHOICES),
    )
    plan: GivenPlan | None = attrs.field(
        default=None,
        converter=_given_plan,
        metadata=about(
            "Apply this plan, or the plan in this surgery.json, instead of making one.", metavar="FILE", form="value"
        ),
    )


@attrs.frozen(kw_only=True, slots=False)
class SearchConfig(Options):
    """What the method `mix` may cut, and in which steps."""

    GROUP: ClassVar[Group] = "Surgery"

    components: tuple[str, ...] | None = attrs.field(
        default=None,
        converter=maybe_names,
        metadata=about(
            "With --method mix, what may be cut (see below).",
            form="list",
            metavar="NAME,...",
            default="channels,singular,experts, and what else a target needs",
            items="components",
            example="channels,singular",
            choices=COMPONENT_CHOICES,
        ),
    )
    multiple: int | None = attrs.field(
        default=None,
        validator=at_least(1),
        metadata=about(
            "With --method mix, keep ranks and widths to multiples of this, as fast kernels want it.",
            metavar="N",
            default="by the hidden size: 16 for 256, 64 from 1,024 on",
        ),
    )
    uniform: bool = attrs.field(
        default=False,
        metadata=about(
            "With --method mix, give the MLPs of all layers one width (or all experts, or all attentions as many "
            "heads) and cut nothing else: a plain checkpoint that every tool loads."
        ),
    )

    @property
    def bypasses(self) -> bool:
        """Whether linear maps may take the place of MLPs, which needs statistics of their own."""
        return "bypass" in (self.components or ())

    def _check(self) -> None:
        if self.components is None:
            return
        if not self.components or not set(self.components) <= set(COMPONENTS):
            raise UserError(f"--components is '{','.join(self.components)}'; allowed: some of {', '.join(COMPONENTS)}.")
        if self.uniform and not set(self.components) & set(UNIFORM_COMPONENTS):
            raise UserError(
                f"--uniform cuts {', '.join(UNIFORM_COMPONENTS)}, and --components names none; leave out one of "
                "the two."
            )


@attrs.frozen(kw_only=True, slots=False)
class RefitConfig(Options):
    """Whether and how what stays is re-solved after the surgery."""

    GROUP: ClassVar[Group] = "Surgery"

    refit: bool | None = attrs.field(
        default=None,
        metadata=about(
            "Re-solve what stays, in closed form, so that the result follows the original.",
            form="switch",
            default="with --method mix and fisher",
        ),
    )
    refit_scope: RefitScope = attrs.field(
        default="all",
        validator=one_of(REFIT_SCOPES),
        metadata=about(
            "operated: low-rank layers only; the others stay as they are, bit for bit.", choices=REFIT_SCOPES
        ),
    )
    refit_general: float = attrs.field(
        default=0.25,
        metadata=about(
            "Sequences of general text (the bundled one) that the refit looks at, for each calibration sequence; at "
            "least 8, or none with 0.",
            metavar="F",
        ),
    )

    def _check(self) -> None:
        if not 0 <= self.refit_general <= 1:
            raise UserError(f"--refit-general is {self.refit_general}; allowed: a fraction from 0 to 1.")
