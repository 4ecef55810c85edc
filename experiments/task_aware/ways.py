"""The ways of making a model smaller that sizes.py compares, by name: published methods, peers, ours.

A way is a function of an opened model and a size (a fraction of the parameters). What each peer is, and where it
differs from its paper, is written in its file under peers/; those that are methods of the product are used as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from peers.desk import Desk, Made, UnreachableSize
from peers.flatten import flattened
from peers.ghosted import ghosted
from peers.modegpt import modegpt
from peers.quantised import quantised
from peers.slicegpt import slicegpt
from points import Points

from layer_surgery.config import BudgetConfig, SearchConfig
from layer_surgery.records import LayerPlan, SurgeryPlan
from layer_surgery.runs.bench import Result, general_text
from layer_surgery.surgeon import ModelShape, make_plan, model_shape, plan_parameters, plan_to_search

#: The most that methods for a number of layers leave of each: they take the fewest layers that way.
KEPT = 0.2


@dataclass
class Work:
    """An opened model with calibration tokens and evaluation texts, and what peers know about it."""

    run: Points
    desk: Desk

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.run.session.checkpoint)

    @contextmanager
    def own_scratch(self) -> Iterator[Work]:
        """Yield the same with scratch files of its own, gone on exit; statistics stay."""
        with self.run.session.own_scratch("point") as session:
            bench = replace(self.run.bench, session=session)
            yield Work(replace(self.run, bench=bench), replace(self.desk, new_scratch=session.new_scratch))

    def operate(self, plan: SurgeryPlan, method: str, *, refit: bool = False, **options: Any) -> Made:
        """Carry out a plan."""
        general = general_text(self.run.session, self.run.tokens, 0.25) if refit else None
        done = replace(self.run.bench, general=general).operate(plan, method, "all" if refit else None, **options)
        return self.made(done)

    def made(self, done: Result) -> Made:
        """Return what the page needs of a result."""
        kept = [
            {"action": layer.action, **layer.kept, "share": round(share, 4)}
            for layer, share in zip(done.plan.layers, layer_shares(self.shape, done.plan), strict=True)
        ]
        return Made(
            checkpoint=done.checkpoint,
            parameters=done.checkpoint.parameters,
            kept=kept,
            predicted=done.plan.predicted_loss_rise,
            expected=asdict(done.expected) if done.expected is not None else None,
        )


def layer_shares(shape: ModelShape, plan: SurgeryPlan) -> list[float]:
    """Return which fraction of its parameters each layer keeps."""
    whole = [LayerPlan(index=layer.index, action="keep") for layer in plan.layers]
    shares = []
    for layer, size in zip(plan.layers, shape.layers, strict=True):
        alone = replace(plan, layers=[layer if other.index == layer.index else other for other in whole])
        shares.append(1.0 - (shape.parameters - plan_parameters(shape, alone)) / size.parameters)
    return shares


Way = Callable[[Work, float], Made]


def fewest_layers(work: Work, size: float, by_influence: bool, kept: float = KEPT) -> list[int]:
    """Return the fewest layers that leave at most the fraction `kept` of each at this size."""
    shape = work.shape
    each = max(layer.parameters for layer in shape.layers) / shape.parameters
    count = math.ceil((1 - size) / ((1 - kept) * each) - 1e-9)
    if count >= len(shape.layers):
        raise UnreachableSize(f"{count} of {len(shape.layers)} layers would have to be operated on")
    scorer, known = "block_influence" if by_influence else "fisher", work.desk.remember("scores", dict)
    found = work.run.bench.scores(scorer, count, keep=kept or 0.1, refit=not by_influence, known=known)
    return found.removal_order[:count]


def some_layers(method: str, *, by_influence: bool, refit: bool = False) -> Way:
    """Return the way that spends the budget on components of as few layers as there can be."""

    def way(work: Work, size: float) -> Made:
        layers = fewest_layers(work, size, by_influence)
        plan = make_plan(work.shape, layers, BudgetConfig(target_parameters=size), method)
        return work.operate(plan, method, refit=refit)

    return way


def without_layers(method: str, *, refit: bool = False) -> Way:
    """Return the way that removes the layers of least block influence, as many as the size asks for: none is left."""

    def way(work: Work, size: float) -> Made:
        layers = fewest_layers(work, size, True, kept=0.0)
        return work.operate(make_plan(work.shape, layers, BudgetConfig(keep=0.0), method), method, refit=refit)

    return way


def all_linears(method: str, *, ranks_fixed: bool) -> Way:
    """Return the way that truncates every linear of every layer, at one ratio if the ranks are fixed."""

    def way(work: Work, size: float) -> Made:
        layers: Sequence[int] = range(work.desk.depth)
        plan = make_plan(work.shape, layers, BudgetConfig(target_parameters=size), method)
        return work.operate(plan, method, ranks_fixed=ranks_fixed)

    return way


def mix(*, refit: bool, uniform: bool = False) -> Way:
    """Return the way of one search over channels and singular vectors of all layers."""

    def way(work: Work, size: float) -> Made:
        shape = work.shape
        plan = plan_to_search(shape, range(len(shape.layers)), BudgetConfig(target_parameters=size), "mix", {})
        return work.operate(plan, "mix", refit=refit, search=SearchConfig(uniform=uniform))

    return way


def peer(make: Callable[[Desk, float], Made]) -> Way:
    """Return the way of a peer that is no method of the product."""
    return lambda work, size: make(work.desk, size)


MIX = "mix + refit"
SOME = "mix, few layers + refit"
OURS = ("fisher + refit", SOME, "mix, one width + refit", "mix", MIX)
WAYS: dict[str, Way] = {
    "removed": without_layers("remove"),
    "removed + refit": without_layers("remove", refit=True),
    "LaCo": without_layers("laco"),
    "ReplaceMe": without_layers("replaceme"),
    "Ghosted Layers": peer(ghosted),
    "GRASP": some_layers("grasp", by_influence=True),
    "SVD": some_layers("svd", by_influence=True),
    "SVD-LLM": some_layers("svd_llm", by_influence=True),
    "SVD-LLM, all layers": all_linears("svd_llm", ranks_fixed=True),
    "OBD-LLM": all_linears("fisher", ranks_fixed=True),
    "IO-SVD": all_linears("fisher", ranks_fixed=False),
    "SliceGPT": peer(slicegpt),
    "FlattenGPT": peer(flattened),
    "MoDeGPT": peer(modegpt),
    "fisher + refit": some_layers("fisher", by_influence=False, refit=True),
    SOME: some_layers("mix", by_influence=False, refit=True),
    "mix, one width + refit": mix(refit=True, uniform=True),
    "mix": mix(refit=False),
    MIX: mix(refit=True),
}
#: What some of the names stand for, where no file under peers/ says it.
NOTES = {
    "OBD-LLM": "two-sided SVD in the metric of activations and of the gradients of the loss (K-FAC, as OBD-LLM, "
    "https://arxiv.org/abs/2604.00821), every linear of every layer at one ratio; the product's `fisher` with fixed "
    "ranks, whose damping is its own (oracle-approximating shrinkage)",
    "IO-SVD": "the same with heterogeneous ranks by one knapsack (as IO-SVD, https://arxiv.org/abs/2605.15626, whose "
    "output side is the curvature of the KL divergence on the likeliest tokens, and whose ranks go by first-order "
    "estimates of the loss: here the empirical Fisher and second-order ones)",
    "SVD-LLM, all layers": "its paper's own setting, every linear at one ratio, without its LoRA",
    "SVD-LLM": "on the layers that GRASP operates on",
    "SVD": "plain, by the weights alone, on the layers that GRASP operates on",
}
QUANTISED = {f"{bits}-bit": bits for bits in (8, 4)}
#: Of every point of this way, also its 8-bit form is measured.
MIX_8_BIT = f"{MIX} + 8-bit"
#: At equal bytes: which way, in how many bits, at the bytes of the original in how many bits.
EQUAL_BYTES = {
    f"{MIX}, bytes of 8-bit": (MIX, 16, 8),
    f"{MIX_8_BIT}, bytes of 4-bit": (MIX, 8, 4),
    "MoDeGPT + 8-bit, bytes of 4-bit": ("MoDeGPT", 8, 4),
}
ALL = (*WAYS, MIX_8_BIT, *QUANTISED, *EQUAL_BYTES)


def original_in(work: Work, bits: int) -> Made:
    """Return the original with its layers' linears in so many bits."""
    checkpoint, size = quantised(work.desk.checkpoint, bits, work.desk.new_scratch)
    return Made(checkpoint=checkpoint, parameters=work.desk.checkpoint.parameters, kept=[], padded=True, bytes=size)


def in_8_bits(work: Work, made: Made) -> Made:
    """Return a result with its layers' linears in 8 bits.

    Of a padded one (`made.padded`), the bytes are those of what it stores, at the cost of a parameter in the original.
    """
    checkpoint, size = quantised(made.checkpoint, 8, work.desk.new_scratch)
    if made.padded:
        size -= round((made.checkpoint.parameters - made.parameters) * bytes_of_a_parameter(work))
    return replace(made, checkpoint=checkpoint, bytes=size, padded=True, predicted=None, expected=None)


def bytes_of_a_parameter(work: Work) -> float:
    """Return what a parameter of the layers' linears takes in 8 bits, scales included."""
    linears = sum(out * in_ for layer in work.shape.layers for out, in_ in layer.linears.values())
    rest = 2 * (work.shape.parameters - linears)
    return (original_bytes(work, 8) - rest) / linears


def original_bytes(work: Work, bits: int) -> int:
    """Return the bytes of the original in so many bits."""
    found: int = work.desk.remember(f"bytes in {bits}", lambda: original_in(work, bits).bytes)
    return found


def size_of_equal_bytes(work: Work, bits: int, as_bits: int) -> float:
    """Return the size at which a model in `bits` takes a little less than the original's bytes in `as_bits`."""
    whole, wanted = work.shape.parameters, 0.995 * original_bytes(work, as_bits)
    if bits == 16:
        return round(wanted / (2 * whole), 4)
    saved = 2.0 - bytes_of_a_parameter(work)
    linears = sum(out * in_ for layer in work.shape.layers for out, in_ in layer.linears.values())
    # whole model in 8 bits: 2 whole - saved linears; every linear's parameter that goes saves what it takes.
    gone = (2 * whole - saved * linears - wanted) / bytes_of_a_parameter(work)
    return round(1 - gone / whole, 4)
