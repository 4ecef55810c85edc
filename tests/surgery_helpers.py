"""Surgery on tiny models as a run does it, and what a refit and its rows are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tiny_models import (
    CALIBRATION,
    CPU,
    decoder_layers,
    full_ranks,
    hooks_on,
    make_test_plan,
    packed_tokens,
    settings,
    streamed,
    tiny_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from layer_surgery.calibration.moment_observer import MomentObserver
from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.open import open_checkpoint
from layer_surgery.checkpoint.save import save_checkpoint
from layer_surgery.config import CalibrationConfig, RuntimeConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.linalg.least_squares import RIDGES
from layer_surgery.progress import Clock, Ui
from layer_surgery.records import RefitRecord, RefitScope, SurgeryPlan
from layer_surgery.runs.bench import Bench, Result, open_bench
from layer_surgery.runs.session import Session
from layer_surgery.surgeon import FactorStore
from layer_surgery.walk.moments import LayerMoments
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk

#: The linears of a Llama layer.
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = (*ATTENTION, *MLP)
#: Enough rows to fit 40 inputs and to hold some out; padded, and with tokens that carry no loss.
REFIT_TOKENS = packed_tokens(40, 12, padding=True, excluded=0.3)


# A method, carried out


@dataclass
class RecordedSession(Session):
    """Keeps the models that it streamed."""

    streamed: list[StreamedModel] = field(default_factory=list)

    def stream(self, checkpoint: Checkpoint) -> StreamedModel:
        self.streamed.append(super().stream(checkpoint))
        return self.streamed[-1]


@contextmanager
def tiny_bench(
    checkpoint: Checkpoint,
    scratch: Path,
    *,
    tokens: PackedTokens = CALIBRATION,
    general: PackedTokens | None = None,
    batch_size: int = 2,
    on_disk: bool = False,
    dtype: torch.dtype = torch.float64,
    maps: bool = False,
) -> Iterator[Bench]:
    """Yield a bench that computes in float64, over scratch files that stay."""
    scratch.mkdir(exist_ok=True, parents=True)
    limit = 0 if on_disk else 1 << 29
    session = RecordedSession(
        checkpoint=checkpoint,
        tokenizer=None,
        runtime=RuntimeConfig(batch_size=batch_size),
        device=CPU,
        dtype=dtype,
        scratch=scratch,
        ui=Ui(),
        clock=Clock(),
        resident_bytes=limit,
        boundary_bytes=limit,
    )
    with open_bench(session, tokens, CalibrationConfig(), general=general, maps=maps) as bench:
        yield bench


def operate(
    plan: SurgeryPlan,
    checkpoint: Checkpoint,
    scratch: Path,
    *,
    ranks_fixed: bool = False,
    statistics: StatisticsSource | None = None,
    **options: Any,
) -> Result:
    """Carry out a plan with its method, without a refit; `options` are those of `tiny_bench`."""
    with tiny_bench(checkpoint, scratch, **options) as bench:
        bench = replace(bench, statistics=statistics or bench.statistics)
        return bench.operate(plan, plan.method, ranks_fixed=ranks_fixed)


def layer_tensors(result: Result, index: int) -> dict[str, Tensor]:
    """Return what layer `index` of the original has in the result, by names within the layer."""
    checkpoint, place = result.checkpoint, result.plan.surviving.index(index)
    tensors = checkpoint.source.read(checkpoint.layer_tensors(place), CPU)
    return {name.removeprefix(checkpoint.layer_prefix(place)): tensor for name, tensor in tensors.items()}


def saved_result(plan: SurgeryPlan, base: Checkpoint, output: Path, **options: Any) -> Path:
    """Carry out a plan, save the result into a new directory and return it; `options` as for `operate`."""
    result = operate(plan, base, output.parent, **options)
    output.mkdir()
    save_checkpoint(result.checkpoint, output, base=base)
    return output


def new_factors(scratch: Path, dtype: torch.dtype = torch.float64) -> FactorStore:
    """Return an empty store in a new folder of `scratch`."""
    return FactorStore(Path(tempfile.mkdtemp(dir=scratch)), dtype)


def statistics_source(scratch: Path, dtype: torch.dtype = torch.float64, **options: Any) -> StatisticsSource:
    """Return a source of statistics that computes into a new folder of `scratch`."""
    return StatisticsSource(Path(tempfile.mkdtemp(dir=scratch)), dtype, **options)


def low_rank_plan(model: PreTrainedModel, *layers: int, rank: int = 6, layer_count: int = 4) -> SurgeryPlan:
    """Return a plan that gives some layers this rank, or less where a linear has less."""
    checkpoint = open_checkpoint(model)
    ranks = {index: {name: min(rank, most) for name, most in full_ranks(checkpoint, index).items()} for index in layers}
    return make_test_plan(layer_count, low_rank=ranks)


# A refit


@dataclass
class Refitted:
    """A result before and after its refit."""

    original: Checkpoint
    plan: SurgeryPlan
    before: Checkpoint
    after: Checkpoint
    records: list[RefitRecord]

    def tensors(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        return checkpoint.source.read(checkpoint.source.specs, CPU)

    def changed(self) -> set[str]:
        """Return the names, in the result, of the tensors that the refit changed."""
        before, after = self.tensors(self.before), self.tensors(self.after)
        assert before.keys() == after.keys()
        return {name for name in before if not torch.equal(before[name], after[name])}

    def stream_errors(self, scratch: Path, tokens: PackedTokens) -> tuple[float, float]:
        """Return how far the last hidden states are from the original's, before and after the refit."""
        target = last_states(self.original, scratch, tokens)
        norm = target.norm()
        before, after = (last_states(c, scratch, tokens) for c in (self.before, self.after))
        return float((before - target).norm() / norm), float((after - target).norm() / norm)


def last_states(checkpoint: Checkpoint, scratch: Path, tokens: PackedTokens) -> Tensor:
    """Return the hidden states [valid tokens, D] after the last layer."""
    dtype = torch.float32 if checkpoint.dtype == torch.float32 else torch.float64
    with Walk(streamed(checkpoint, dtype=dtype), tokens, settings(scratch)) as walk:
        last = walk.forward(range(checkpoint.layer_count), keep=False)
        return last.read(slice(0, tokens.sequences))[tokens.valid]


def refitted(
    model: PreTrainedModel | Path,
    plan: SurgeryPlan,
    scratch: Path,
    *,
    tokens: PackedTokens = REFIT_TOKENS,
    scope: RefitScope = "all",
    batch_size: int = 7,
    **options: Any,
) -> Refitted:
    """Operate without a refit and with one; `options` are those of `tiny_bench`."""
    checkpoint = open_checkpoint(model)
    with tiny_bench(checkpoint, scratch, tokens=tokens, batch_size=batch_size, **options) as bench:
        before, after = (bench.operate(plan, plan.method, which, ranks_fixed=True) for which in (None, scope))
        assert [hooks_on(model.model) for model in bench.session.streamed] == [[], []]  # original and result
    return Refitted(checkpoint, plan, before.checkpoint, after.checkpoint, after.refitted)


# Rows of the whole model


def inputs_and_outputs(model: PreTrainedModel, index: int, name: str, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    """Return what goes into a linear of the whole model and comes out of it, [N, S, in] and [N, S, out]."""
    seen: list[Tensor] = []
    linear = decoder_layers(model)[index].get_submodule(name)
    handle = linear.register_forward_hook(lambda _m, arguments, output: seen.extend((arguments[0], output)))
    with torch.no_grad():
        model(tokens.token_ids, use_cache=False)
    handle.remove()
    return seen[0], seen[1]


def check_resolved(
    result: Refitted,
    linear: tuple[int, str],
    tensor: str,
    rows: tuple[Tensor, Tensor],
    weight: Tensor,
    tokens: PackedTokens = REFIT_TOKENS,
) -> None:
    """Compare the re-solved weight and its ridge with the best over the rows [N, S, in] and targets [N, S, out].

    Args:
        linear: layer of the original and name of the linear.
        tensor: name of its re-solved weight in the result.
        weight: as it was.
    """
    ridge, expected = best_by_rows(weight, *rows, tokens)
    (record,) = [record for record in result.records if (record.layer, record.linear) == linear]
    assert record.ridge == ridge
    found = result.tensors(result.after)[tensor]
    assert float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0)) < 1e-6


def best_by_rows(weight: Tensor, z: Tensor, y: Tensor, tokens: PackedTokens, every: int = 8) -> tuple[float, Tensor]:
    """Return the ridge that is best on every eighth window, and its solution on all windows, row by row."""
    windows = torch.arange(tokens.sequences)[:, None].expand_as(tokens.valid)
    held = tokens.valid & (windows % every == every - 1)
    train = tokens.valid & ~held
    errors = {r: held_out_error(by_rows(weight, z[train], y[train], r), z[held], y[held]) for r in RIDGES}
    ridge = min(errors, key=lambda r: errors[r])
    assert errors[ridge] < held_out_error(weight, z[held], y[held])
    return ridge, by_rows(weight, z[tokens.valid], y[tokens.valid], ridge)


def by_rows(weight: Tensor, z: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Return `argmin |Z W'^T - Y|^2 + ridge * mean(z^2 summed over rows) * |W' - W|^2` as one tall lstsq."""
    penalty = (ridge * float((z**2).sum()) / z.shape[1]) ** 0.5
    tall = torch.cat([z, penalty * torch.eye(z.shape[1], dtype=z.dtype)])
    right = torch.cat([y, penalty * weight.T])
    solution: Tensor = torch.linalg.lstsq(tall, right, driver="gelsd").solution.T
    return solution


def held_out_error(weight: Tensor, z: Tensor, y: Tensor) -> float:
    """Return the squared error as a fraction of the targets' sum of squares."""
    return float(((z @ weight.T - y) ** 2).sum() / (y**2).sum())


# Moments


class RecordedMoments(MomentObserver):
    """Keeps the moments of all linears of every layer that it sees."""

    def __init__(self, *, fail: bool = False) -> None:
        super().__init__(dict.fromkeys(range(4), LINEARS), gradients=True)
        self.moments: dict[int, LayerMoments] = {}
        self._fail = fail

    def batch(self, valid: Tensor) -> None:
        super().batch(valid)
        if self._fail:
            raise RuntimeError("on purpose")

    def reduce(self, index: int, layer: nn.Module, moments: LayerMoments) -> None:
        self.moments[index] = moments


def walked_moments(tokens: PackedTokens, scratch: Path, batch_size: int = 2) -> dict[int, LayerMoments]:
    """Return the moments of the tiny Llama's linears from one forward and backward walk."""
    observer = RecordedMoments()
    with Walk(streamed(tiny_model()), tokens, settings(scratch, batch_size=batch_size)) as walk:
        walk.backpropagate([observer])
    return observer.moments
