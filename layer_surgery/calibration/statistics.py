"""Statistics of linears: their components in the metric of the task loss, what cuts cost by them, and the best ranks.

`collector.py` makes them from one walk over the calibration data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from layer_surgery.calibration.bypass import MapWorth, bias_of
from layer_surgery.calibration.couplings import Couplings
from layer_surgery.calibration.units import UnitOrder
from layer_surgery.checkpoint.modeling_layer_surgery import IN_FACTOR, OUT_FACTOR
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import DataError
from layer_surgery.linalg.low_rank import Factors, knapsack
from layer_surgery.records import Part
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk

Ranks = Mapping[str, int]
Size = tuple[int, int]  # (out, in)
#: How often ranks are chosen anew after what they leave of each other.
_ROUNDS = 4
#: Names, behind that of an MLP, of the means of what it reads and gives.
MEANS = ("mean_input", "mean_output")


@dataclass
class Statistics:
    """Spectra of linears in the Kronecker-factored Fisher metric, and where their components are."""

    components: FactorStore
    loss_scale: float
    """Tokens per token that carries loss: moments are means over all tokens, a loss over those that carry it."""
    sizes: dict[int, dict[str, Size]] = field(default_factory=dict)  #: (out, in) of the linears, by layer and name.
    values: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """Singular values in the metric, in descending order. Of wide linears, those behind `ranks` are the root mean
    square of the rest, so that what a cut to any rank up to that costs is right."""
    ranks: dict[int, dict[str, int]] = field(default_factory=dict)  #: How many components of each are kept.
    channels: dict[int, UnitOrder] = field(default_factory=dict)
    """Channels of the MLPs that can be cut, by layer; moments are means over all tokens, as for `values`."""
    heads: dict[int, UnitOrder] = field(default_factory=dict)  #: The same of attentions, each head with its queries.
    experts: dict[int, list[UnitOrder]] = field(default_factory=dict)
    """The same of the channels of every expert of a layer, by layer."""
    maps: dict[int, MapWorth] = field(default_factory=dict)
    """The linear maps that may stand for MLPs, by layer, if they were asked for; their tensors are with the components,
    under the name of the MLP."""
    couplings: Couplings = field(default_factory=Couplings)
    fed_by: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """For each output projection, the linears whose outputs it reads."""

    @classmethod
    def empty(cls, walk: Walk, components: FactorStore) -> Statistics:
        """Return statistics of no linear yet, for what a walk goes over."""
        architecture = walk.model.architecture
        fed_by = {names[-1]: names[:-1] for names in (architecture.attention, architecture.mlp) if names}
        return cls(components, int(walk.all_tokens.valid.sum()) / walk.all_tokens.predicted_tokens, fed_by=fed_by)

    def covers(self, layers: Mapping[int, Ranks]) -> bool:
        """Return whether all of these components are there."""
        return all(
            rank <= self.ranks.get(index, {}).get(name, 0)
            for index, ranks in layers.items()
            for name, rank in ranks.items()
        )

    def factors(self, index: int, ranks: Ranks) -> dict[str, Factors]:
        """Return the leading components of some linears of a layer."""
        tensors = self.components.read(index)
        return {
            name: Factors(tensors[f"{name}.{OUT_FACTOR}"][:, :rank], tensors[f"{name}.{IN_FACTOR}"][:rank])
            for name, rank in ranks.items()
        }

    def map_tensors(self, index: int, module: str, rank: int) -> dict[str, Tensor]:
        """Return the tensors of the best linear map of this rank in the place of an MLP: its factors and its bias."""
        tensors = self.components.read(index)
        left, right = tensors[f"{module}.{OUT_FACTOR}"][:, :rank], tensors[f"{module}.{IN_FACTOR}"][:rank]
        means = (tensors[f"{module}.{name}"] for name in MEANS)
        return {OUT_FACTOR: left, IN_FACTOR: right, "bias": bias_of((left, right), *means)}

    def cost(self, index: int, ranks: Ranks) -> float:
        """Return the predicted rise of the loss if linears of a layer are cut to these ranks, in nats per token.

        To second order: a component that is left out costs `1/2 value^2`.
        """
        left_out = sum(sum(v**2 for v in self.values[index][name][rank:]) for name, rank in ranks.items())
        return 0.5 * left_out * self.loss_scale

    def layer_ranks(self, index: int, keep: float, parameters: int) -> dict[str, int]:
        """Return the best ranks of a layer by itself if a fraction `keep` of its `parameters` goes to its factors.

        At least one rank in each linear.
        """
        least = sum(map(sum, self.sizes[index].values()))
        return self.best_ranks({index: self.sizes[index]}, max(least, int(keep * parameters)))[index]

    def best_ranks(self, linears: Mapping[int, Iterable[str]], budget: int) -> dict[int, dict[str, int]]:
        """Return a rank for each of these linears by one knapsack, with at most `budget` parameters in all factors.

        A component of an output projection is worth `1/2 value^2` only as far as what feeds it is still there, so the
        knapsack is solved again with what the last solution leaves of its inputs.
        """
        keys = [(index, name) for index, names in linears.items() for name in names]
        costs = [sum(self.sizes[index][name]) for index, name in keys]
        limits = [self.ranks[index][name] for index, name in keys]
        faithful = dict.fromkeys(keys, 1.0)
        ranks: dict[tuple[int, str], int] = {}
        for _ in range(_ROUNDS):
            values = [[v * faithful[i, name] ** 0.5 for v in self.values[i][name]] for i, name in keys]
            ranks = dict(zip(keys, knapsack(values, costs, limits, budget), strict=True))
            for i, name in keys:
                feeding = [(i, other) for other in self.fed_by.get(name, ()) if (i, other) in ranks]
                faithful[i, name] = min((self._kept_share(*key, ranks[key]) for key in feeding), default=1.0)
        result: dict[int, dict[str, int]] = {index: {} for index in linears}
        for (index, name), rank in ranks.items():
            result[index][name] = rank
        return result

    def of_layer(self, index: int) -> dict[str, Any]:
        """Return what is known of one layer, but for couplings and tensors, as JSON."""
        lone: dict[str, Mapping[int, Any]] = {"channels": self.channels, "heads": self.heads, "maps": self.maps}
        return {
            "sizes": self.sizes[index],
            "values": self.values[index],
            "ranks": self.ranks[index],
            "experts": [asdict(order) for order in self.experts[index]] if index in self.experts else None,
            **{name: asdict(of[index]) if index in of else None for name, of in lone.items()},
        }

    def put(self, index: int, layer: Mapping[str, Any]) -> None:
        """Take what `of_layer` has given in an earlier run."""
        self.sizes[index] = {name: (int(out), int(in_)) for name, (out, in_) in layer["sizes"].items()}
        self.values[index], self.ranks[index] = layer["values"], layer["ranks"]
        for name, orders in (("channels", self.channels), ("heads", self.heads)):
            if layer[name] is not None:
                orders[index] = UnitOrder(**layer[name])
        if layer["experts"] is not None:
            self.experts[index] = [UnitOrder(**order) for order in layer["experts"]]
        if layer["maps"] is not None:
            self.maps[index] = MapWorth(**layer["maps"])

    def _kept_share(self, index: int, name: str, rank: int) -> float:
        """Return how much of a linear's worth its first components hold, 0 to 1."""
        worth = [value**2 for value in self.values[index][name]]
        return sum(worth[:rank]) / (sum(worth) or 1.0)


def replaceable_linears(model: StreamedModel, index: int, part: Part = "layer") -> dict[str, Size]:
    """Return (out, in) of the linears of a layer, or of a part of it, that surgery can replace.

    Those that are low-rank already are not among them.
    """
    names = model.architecture.linears_of(part)
    linears = {}
    for name, module in model.layers[index].named_modules():
        if name in names and isinstance(module, nn.Linear):
            linears[name] = (module.out_features, module.in_features)
    return {name: linears[name] for name in names if name in linears}


def useful_rank(size: Size) -> int:
    """Return the largest rank whose factors take no more parameters than the dense weight (at least 1)."""
    out, in_ = size
    return max(1, out * in_ // (out + in_))


def useful_ranks(model: StreamedModel, layers: Iterable[int], part: Part = "layer") -> dict[int, dict[str, int]]:
    """Return the largest useful rank of every replaceable linear of some layers."""
    return {
        index: {name: useful_rank(size) for name, size in replaceable_linears(model, index, part).items()}
        for index in layers
    }


def check_tokens(tokens: PackedTokens, hidden_size: int, what: str) -> None:
    """Raise `DataError` if there are too few calibration tokens for second moments to mean anything."""
    count = int(tokens.valid.sum())
    if count < hidden_size:
        samples = -(-hidden_size // tokens.sequence_length)
        raise DataError(
            f"{what} needs at least as many calibration tokens as the model is wide, {hidden_size:,}, but there are "
            f"{count:,}; give --samples {samples} or more at this --sequence-length (many more are better)."
        )
