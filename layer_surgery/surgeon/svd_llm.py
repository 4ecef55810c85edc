"""SVD-LLM: truncated SVD in the metric of what each linear reads.

Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression
(https://arxiv.org/abs/2403.07378).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from layer_surgery.calibration.statistics import check_tokens, damped
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.linalg.low_rank import Factors, whitened_svd
from layer_surgery.records import SpectrumRecord, SurgeryPlan
from layer_surgery.surgeon.context import METHODS, SurgeryContext
from layer_surgery.surgeon.spectra import spectrum_record
from layer_surgery.walk.moments import MomentRecorder
from layer_surgery.walk.walk import Observer


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
    walk = context.walk
    check_tokens(walk.tokens, walk.model.hidden_size, "svd_llm")
    ranks = {layer.index: layer.ranks for layer in plan.low_rank}
    observer = WhitenedObserver(ranks, context.factors, context.spectra)
    walk.forward(range(max(ranks) + 1), keep=False, observers=[observer], watch=ranks)
    return plan
