"""Truncations in the metric of the data: activations alone (SVD-LLM), or activations and loss gradients (Fisher).

Wang et al., SVD-LLM (https://arxiv.org/abs/2403.07378). For both sides, the Kronecker-factored Fisher metric of
Martens & Grosse (https://arxiv.org/abs/1503.05671), in SVD compression GFWSVD (https://arxiv.org/abs/2505.17974).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from layer_surgery.factors import FactorStore
from layer_surgery.low_rank import Factors, whitened_svd
from layer_surgery.moments import MomentRecorder
from layer_surgery.records import SpectrumRecord, SurgeryPlan
from layer_surgery.spectra import spectrum_record
from layer_surgery.statistics import check_tokens, damped, replaceable_linears, useful_rank
from layer_surgery.surgeon.context import METHODS, SurgeryContext, the_walk
from layer_surgery.surgeon.svd import without_parts
from layer_surgery.walk import Observer


class WhitenedObserver(Observer):
    """Truncates the linears of each layer that it sees, in the metric of their inputs."""

    def __init__(
        self, ranks: Mapping[int, Mapping[str, int]], factors: FactorStore, spectra: list[SpectrumRecord]
    ) -> None:
        self._ranks, self._factors, self._spectra = ranks, factors, spectra
        self._recorder: MomentRecorder | None = None

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        linears = {name: layer.get_submodule(name) for name in self._ranks[index]}
        self._recorder = MomentRecorder(linears, gradients=False)
        with self._recorder.recording() as moments:
            yield
        inputs: dict[str, Tensor] = {}
        for name, rank in self._ranks[index].items():
            reader = moments.reads[name]
            if reader not in inputs:
                inputs[reader] = damped(moments.input_moment(name), moments.tokens, index, name)
            (left, right), values = whitened_svd(layer.get_parameter(f"{name}.weight").detach(), inputs[reader])
            self._factors.write(index, {name: Factors(left[:, :rank], right[:rank])})
            self._spectra.append(spectrum_record(index, name, "inputs", values.tolist(), rank))

    def batch(self, valid: Tensor) -> None:
        assert self._recorder is not None
        self._recorder.start_batch(valid)


@METHODS.add(
    "svd_llm",
    summary="truncated SVD that changes the outputs on the calibration data least (SVD-LLM)",
    source="https://arxiv.org/abs/2403.07378",
    needs_data=True,
)
def svd_llm(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Truncate each linear in the metric of its inputs' second moment, at the plan's ranks."""
    walk = the_walk(context)
    check_tokens(walk.tokens, walk.model.hidden_size, "svd_llm")
    ranks = {layer.index: layer.ranks for layer in plan.low_rank}
    observer = WhitenedObserver(ranks, context.factors, context.spectra)
    walk.forward(list(range(max(ranks) + 1)), keep=False, observers=[observer], watch=ranks)
    return plan


@METHODS.add(
    "fisher",
    summary="truncated SVD in the Kronecker-factored Fisher metric, ranks by one knapsack over all matrices",
    source="https://arxiv.org/abs/2505.17974",
    needs_boundaries=True,
    refits=True,
)
def fisher(plan: SurgeryPlan, context: SurgeryContext) -> SurgeryPlan:
    """Keep the components that are worth most nats per parameter; return the plan with the ranks that this gives.

    Ranks that the user gave (`context.ranks_fixed`) are kept as they are.
    """
    if not any(rank for layer in plan.low_rank for rank in layer.ranks.values()):
        return without_parts(plan, context)
    planned = {layer.index: layer.ranks for layer in plan.low_rank}
    sizes = {index: replaceable_linears(context.model, index) for index in planned}
    most = {
        index: {name: max(rank, useful_rank(sizes[index][name])) for name, rank in ranks.items()}
        for index, ranks in planned.items()
    }
    statistics = context.statistics.get(the_walk(context), most)
    ranks: Mapping[int, Mapping[str, int]] = planned
    if not context.ranks_fixed:
        spendable = _cost(planned, sizes) + plan.parameter_bound - plan.parameters
        ranks = statistics.best_ranks(planned, spendable)
    for index in ranks:
        context.factors.write(index, statistics.factors(index, ranks[index]))
        context.spectra.extend(
            spectrum_record(index, name, "fisher", statistics.values[index][name], rank)
            for name, rank in ranks[index].items()
        )
    layers = [replace(layer, ranks=dict(ranks.get(layer.index, {}))) for layer in plan.layers]
    # The prediction knows neither layers removed outright nor plans of which other linears than usual are low-rank.
    usual = {index: replaceable_linears(context.model, index, context.statistics.part) for index in ranks}
    unknown = any(layer.action == "remove" for layer in plan.layers) or any(
        ranks[index].keys() != usual[index].keys() for index in ranks
    )
    whole = sum(out * in_ for index in ranks for out, in_ in usual[index].values())
    predicted = statistics.couplings.cost(list(ranks), _cost(ranks, sizes) / whole)
    return replace(
        plan,
        layers=layers,
        parameters=plan.parameters + _cost(ranks, sizes) - _cost(planned, sizes),
        predicted_loss_rise=None if unknown else round(predicted, 6),
    )


def _cost(ranks: Mapping[int, Mapping[str, int]], sizes: Mapping[int, Mapping[str, tuple[int, int]]]) -> int:
    """Return the parameters of all factors."""
    return sum(rank * sum(sizes[index][name]) for index in ranks for name, rank in ranks[index].items())
