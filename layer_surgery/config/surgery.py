"""Options that say which layers are operated on, how, and what may stay of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import attrs

from layer_surgery.config.declaring import Options, about, at_least, maybe_whole_numbers, names, one_of
from layer_surgery.errors import PlanError, UserError
from layer_surgery.records.plan import PARTS, REFIT_SCOPES, Part, RefitScope, SurgeryPlan

DEFAULT_METHOD = "fisher"
DEFAULT_SCORER = "fisher"
#: The method where a budget for the whole model is all that is asked for.
WHOLE_MODEL_METHOD = "mix"
COMPONENTS = ("channels", "singular")


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


@attrs.frozen(kw_only=True, slots=False)
class PartConfig(Options):
    """Which part of each layer is operated on."""

    remove: Part = attrs.field(
        default="layer",
        validator=one_of(PARTS, PlanError),
        metadata=about(
            "Operate on whole layers, or only on their attention or their MLP; the budget is then of these.",
            metavar="layer|attention|mlp",
        ),
    )


@attrs.frozen(kw_only=True, slots=False)
class BudgetConfig(PartConfig):
    """Which layers are operated on, and how many parameters may stay in them."""

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
        metadata=about(
            "The same budget as a fraction of all the model's parameters, instead of --keep. Alone, "
            "without the number of layers, all layers take part: see --method mix.",
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

    def _check(self) -> None:
        if self.keep is not None and self.target_parameters is not None:
            raise PlanError("--keep and --target-parameters are the same budget in two units; give only one of them.")
        if self.target_parameters is not None and not 0 < self.target_parameters <= 1:
            raise PlanError(f"--target-parameters is {self.target_parameters}; allowed: a fraction above 0, up to 1.")
        if self.layers is not None:
            repeated = sorted({index for index in self.layers if self.layers.count(index) > 1})
            if not self.layers or repeated:
                raise PlanError(
                    f"--layers must name each layer once; {f'repeated: {repeated}' if repeated else 'none given'}."
                )


@attrs.frozen(kw_only=True, slots=False)
class ChoiceConfig(Options):
    """Who chooses the layers, and what takes their place."""

    scorer: str = attrs.field(
        default=DEFAULT_SCORER, metadata=about("How layers are ranked (see below).", metavar="NAME", default="")
    )
    method: str | None = attrs.field(
        default=None, metadata=about("How low-rank components are made (see below).", metavar="NAME")
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

    components: tuple[str, ...] = attrs.field(
        default=COMPONENTS,
        converter=names,
        metadata=about(
            "With --method mix, what may be cut: channels of MLPs, singular vectors of linears.",
            form="list",
            metavar="channels,singular",
        ),
    )
    multiple: int = attrs.field(
        default=8,
        validator=at_least(1),
        metadata=about("With --method mix, keep ranks and widths to multiples of this, as fast kernels want it."),
    )
    uniform: bool = attrs.field(
        default=False,
        metadata=about(
            "With --method mix, give the MLPs of all layers one width and cut nothing else: a plain checkpoint that "
            "every tool loads."
        ),
    )

    def _check(self) -> None:
        unknown = [name for name in self.components if name not in COMPONENTS]
        if unknown or not self.components:
            raise UserError(
                f"--components is '{','.join(self.components)}'; allowed: one or both of {', '.join(COMPONENTS)}."
            )
        if self.uniform and "channels" not in self.components:
            raise UserError("--uniform cuts channels, which --components leaves out; leave out one of the two.")


@attrs.frozen(kw_only=True, slots=False)
class RefitConfig(Options):
    """Whether and how what stays is re-solved after the surgery."""

    refit: bool | None = attrs.field(
        default=None,
        metadata=about(
            "Re-solve what stays, in closed form, so that the result follows the original.",
            form="switch",
            default=f"with --method {DEFAULT_METHOD}",
        ),
    )
    refit_scope: RefitScope = attrs.field(
        default="all",
        validator=one_of(REFIT_SCOPES),
        metadata=about(
            "operated: low-rank layers only; the others stay as they are, bit for bit.", metavar="all|operated"
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
