"""The plan: what is done to every layer, as plain JSON that a user may read, edit and apply again."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from layer_surgery.disk.reading import read_json, why
from layer_surgery.errors import PlanError

#: Raised whenever what a plan holds changes; 1 had no channels.
PLAN_SCHEMA_VERSION = 2

Action = Literal["keep", "remove", "low_rank", "reduce"]
ACTIONS: tuple[Action, ...] = ("keep", "remove", "low_rank", "reduce")
UnitName = Literal["channels", "heads", "experts", "routed", "bypass"]
"""What a layer may have fewer of: channels of its MLP, heads of its attention, channels of every expert, whole experts,
ranks of a linear map in the place of its MLP."""
UNITS: tuple[UnitName, ...] = ("channels", "heads", "experts", "routed", "bypass")
Part = Literal["layer", "attention", "mlp"]
"""The part of a layer that is operated on."""
PARTS: tuple[Part, ...] = ("layer", "attention", "mlp")
RefitScope = Literal["operated", "all"]
REFIT_SCOPES: tuple[RefitScope, ...] = ("operated", "all")


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The action on one decoder layer of the original model (indices count from 0)."""

    index: int
    action: Action
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank of each linear, by its name within the layer; for `low_rank` and `reduce` only. Others of the layer stay
    whole; of one with rank 0 only the bias stays."""
    channels: int | None = None
    """How many channels of the MLP stay, for `reduce` only; None: all of them."""
    heads: int | None = None
    """How many key/value heads stay, each with its queries, for `reduce` only; None: all of them."""
    experts: int | None = None
    """How many channels of every expert stay, for `reduce` only; None: all of them."""
    routed: int | None = None
    """How many experts stay, for `reduce` only; None: all of them."""
    bypass: int | None = None
    """Rank of the linear map that stands in the place of the MLP, for `reduce` only; None: the MLP is there."""

    @property
    def units(self) -> dict[UnitName, int]:
        """How many channels, heads, experts and so on there are, if not all, under these names."""
        counts = {name: getattr(self, name) for name in UNITS}
        return {name: count for name, count in counts.items() if count is not None}

    @property
    def kept(self) -> dict[str, int]:
        """Ranks by linear, and by `UNITS` what else there is less of."""
        return self.ranks | {str(name): count for name, count in self.units.items()}


@dataclass(frozen=True, kw_only=True)
class SurgeryPlan:
    """The action on every layer. Plain data: read it, edit it, apply it with `--plan`."""

    method: str
    target_layers: int  #: Layers left as they are (those of the original that are low-rank already count too).
    layers: list[LayerPlan]
    base_sha256: str = ""  #: Hash of the checkpoint that the plan was made for; empty if it is for any.
    parameters: int = 0  #: Parameters of the result.
    parameter_bound: int = 0  #: The budget: `parameters` is never above it, and below it by less than one rank.
    bounds: dict[str, float] = field(default_factory=dict)
    """Budgets in other resources: flops and kv_cache_bytes per token, milliseconds per token of the weights alone."""
    predicted_loss_rise: float | None = None
    """Second-order prediction for the calibration data, before any refit, nats per token with loss, where the method
    makes one. Good for comparing plans; for changes as large as most of a layer it is above the measured rise."""
    predicted_loss_bound: float | None = None
    """No plan of the same kind within the same budgets is predicted to cost less than this."""
    refit: Literal["", "none", "operated", "all"] = ""
    """Which linears are re-solved afterwards: none, those of the low-rank layers, or also others. "" does not say."""
    schema_version: int = PLAN_SCHEMA_VERSION

    @property
    def operated(self) -> list[LayerPlan]:
        """Layers that are not kept whole."""
        return [layer for layer in self.layers if layer.action != "keep"]

    @property
    def low_rank(self) -> list[LayerPlan]:
        """Layers with linears of a lower rank."""
        return [layer for layer in self.layers if layer.ranks]

    @property
    def smaller(self) -> list[LayerPlan]:
        """Layers that stay with fewer parameters: of lower rank, or with fewer channels."""
        return [layer for layer in self.layers if layer.action in ("low_rank", "reduce")]

    @property
    def surviving(self) -> list[int]:
        """Indices of the layers that are in the result, whole or low-rank."""
        return [layer.index for layer in self.layers if layer.action != "remove"]

    @property
    def removed_runs(self) -> list[tuple[int, int]]:
        """(First removed layer, first layer after it) for each run of removed layers."""
        removed = [layer.index for layer in self.layers if layer.action == "remove"]
        firsts = [index for index in removed if index - 1 not in removed]
        lasts = [index for index in removed if index + 1 not in removed]
        return [(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, origin: str = "the plan") -> Self:
        """Check and read a plan; `origin` (a file name) is what errors call it. Raises `PlanError`."""
        if isinstance(data, dict) and "plan" in data and "layers" not in data:  # a whole surgery.json will do
            data = data["plan"]
        if not isinstance(data, dict):
            raise PlanError(f"{origin} is not a JSON object.")
        version = data.get("schema_version", PLAN_SCHEMA_VERSION)
        if not isinstance(version, int) or version > PLAN_SCHEMA_VERSION:
            raise PlanError(f"{origin} has schema version {version}; this release reads up to {PLAN_SCHEMA_VERSION}.")
        layers = data.get("layers")
        if layers is None and isinstance(data.get("points"), list):
            raise PlanError(
                f"{origin} is a sweep's, with a plan for every point; save the 'plan' of one and give that."
            )
        if not isinstance(layers, list) or not layers:
            raise PlanError(f"{origin} has no list 'layers'.")
        read = [_layer_from_dict(entry, position, origin) for position, entry in enumerate(layers)]
        refit = data.get("refit", "")
        if refit not in ("", "none", *REFIT_SCOPES):
            raise PlanError(f"{origin} has refit {refit!r}; allowed: none, {', '.join(REFIT_SCOPES)}.")
        whole = sum(layer.action == "keep" for layer in read)
        if data.get("target_layers", whole) != whole:
            raise PlanError(
                f"{origin} says target_layers {data['target_layers']}, but keeps {whole} layers whole; "
                "make the two agree or leave target_layers out."
            )
        return cls(
            method=str(data.get("method", "")),
            target_layers=whole,
            layers=read,
            base_sha256=str(data.get("base_sha256", "")),
            refit=refit,
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a plan, or the plan in a `surgery.json`."""
        try:
            data = read_json(path)
        except OSError as error:
            raise PlanError(f"--plan {path} cannot be read ({why(error)}).") from error
        except ValueError as error:
            raise PlanError(f"--plan {path} is not JSON ({error}).") from error
        return cls.from_dict(data, str(path))


def _layer_from_dict(entry: Any, position: int, origin: str) -> LayerPlan:
    if not isinstance(entry, dict) or entry.get("index") != position:
        raise PlanError(f"{origin}: entry {position} of 'layers' must have \"index\": {position}.")
    allowed = ("index", "action", "ranks", *UNITS)
    unknown = sorted(set(entry) - set(allowed))
    if unknown:
        raise PlanError(
            f"{origin}: layer {position} has the unknown field '{unknown[0]}'; allowed: {', '.join(allowed)}."
        )
    action = entry.get("action")
    if action not in ACTIONS:
        raise PlanError(f"{origin}: layer {position} has action {action!r}; allowed: {', '.join(ACTIONS)}.")
    ranks = entry.get("ranks") or {}
    if not isinstance(ranks, dict) or not all(type(rank) is int and rank >= 0 for rank in ranks.values()):
        raise PlanError(f"{origin}: the ranks of layer {position} must be whole numbers from 0 on, by linear.")
    units = {name: entry.get(name) for name in UNITS}
    for name, count in units.items():
        if count is not None and (type(count) is not int or count < 1 or action != "reduce"):
            raise PlanError(
                f"{origin}: layer {position} has action {action!r} and {count!r} {name}; allowed: a whole number "
                "from 1 on, with reduce only."
            )
    if bool(ranks) != (action == "low_rank") and action != "reduce":
        raise PlanError(
            f"{origin}: layer {position} has action {action!r} and {len(ranks)} ranks; only low_rank has any."
        )
    if action == "reduce" and not ranks and not any(units.values()):
        raise PlanError(f"{origin}: layer {position} has action 'reduce', but neither ranks nor {' nor '.join(UNITS)}.")
    ranks = {str(name): rank for name, rank in ranks.items()}
    return LayerPlan(index=position, action=action, ranks=ranks, **units)
