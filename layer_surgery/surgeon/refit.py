"""Refit: after surgery, re-solve what stays so that the result follows the original again. No training.

The original and the result are walked side by side over the calibration tokens, layer by layer. A linear that
reads the stream z of the result, where the original's reads x, is re-solved by ridge least squares: those that read the
stream (queries, keys, values, gate, up) to give what the original's give, output projections so that the residual
stream itself comes back to the original's; before a run of removed layers, to where the original is after the run. In
low-rank linears only the left factor is re-solved. Nothing is added to the model. Related: ReplaceMe
(https://arxiv.org/abs/2505.02819) folds one linear map into one projection; here every later layer helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from layer_surgery import parallel
from layer_surgery.checkpoint.experts import experts_of
from layer_surgery.checkpoint.modeling_layer_surgery import IN_FACTOR, OUT_FACTOR, LowRankLinear
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.errors import DataError
from layer_surgery.journal import NO_STEPS, NOTHING_KEPT, Finished, Journal, Steps
from layer_surgery.records import RefitRecord, RefitScope, SurgeryPlan
from layer_surgery.surgeon.expert_refit import ExpertTokens, expert_scale, refit_experts, run_with_experts
from layer_surgery.surgeon.layer_pair import (
    ResidualScales,
    residual_scales,
    run_watched,
    scales_of_all,
    watch_linears,
    wide,
    without_bias,
)
from layer_surgery.surgeon.refit_problems import LinearProblems, solved_weight
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.rehearsal import LayerCall, Rehearsal
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Losses, Walk, boundary_steps

#: Fewest windows that a refit makes sense with: some are held out.
LEAST_WINDOWS = 4
#: One window in so many is held out to choose ridges on (one in two if there are fewer).
_HELD_OUT = 8


@dataclass
class _Track:
    """Some calibration tokens: the walk of the original over them, and the stream of the result."""

    walk: Walk
    first_window: int  #: Number of the first window among those of all tracks.
    room: Boundary  #: For the stream of the result once it differs.
    differs: bool = False  #: Whether the stream of the result is no longer the original's.

    def stream(self, position: int) -> Boundary:
        """Return the stream of the result before its layer `position`."""
        return self.room if self.differs else self.walk.boundary(position)

    def held_out(self, rows: slice, every: int) -> Tensor:
        """Return which windows of a micro-batch are held out [B] bool."""
        return (self.first_window + self.walk.share.windows[rows]) % every == every - 1


@dataclass(frozen=True)
class Refit:
    """What a refit has solved, and what is left of the loss's rise on the tokens that it looked at."""

    records: list[RefitRecord]
    before: Losses  #: Of the original, on the calibration tokens (the first walk's).
    after: Losses  #: Of the result, on the same.


def refit(
    plan: SurgeryPlan,
    walks: Sequence[Walk],
    result: StreamedModel,
    refitted: FactorStore,
    scope: RefitScope,
    rows: Mapping[int, Mapping[str, Tensor]] | None = None,
    *,
    steps: Steps = NO_STEPS,
    journal: Journal = NOTHING_KEPT,
) -> Refit:
    """Write re-solved tensors, by the original's layer indices, to `refitted`; return what was solved.

    Args:
        plan: what was done.
        walks: over the original; the first is over the calibration tokens.
        result: the model that the surgery gave; its layers are changed while they pass.
        refitted: where the tensors go.
        scope: `operated` touches layers that the plan makes smaller; `all` also the layer before a removed run and
            every layer after the first cut.
        rows: of narrowed linears, by layer and name, the original's rows [n] int64 that they have.
        steps: where finished layers are kept, `refitted` among them; those of an earlier run are not done again.
        journal: of the run, where the boundaries of the original are.

    Memory: one layer of each model, and the sums of one group of linears. Raises `DataError` for too few windows.
    """
    check_windows(sum(walk.all_tokens.sequences for walk in walks))
    surviving = plan.surviving
    calls = Rehearsal(result)
    records: list[RefitRecord] = []
    with ExitStack() as stack:
        tracks: list[_Track] = []
        for walk in walks:
            walk.forward(range(walk.model.layer_count), keep=True, steps=boundary_steps(journal, walk))
            room = Boundary(stack.enter_context(walk.new_store()), 0)
            tracks.append(_Track(walk, sum(track.walk.all_tokens.sequences for track in tracks), room))
        original, progress = walks[0].model, walks[0].settings.progress
        advance = stack.enter_context(progress("refitting", len(surviving)))
        finished = steps.leading(map(str, surviving))
        for step in finished:
            records += [RefitRecord(**record) for record in step.record["records"]]
            advance()
        if finished:
            _resume(tracks, finished[-1])
        for position, index in enumerate(surviving[len(finished) :], len(finished)):
            before_it = len(records)
            after = surviving[position + 1] if position + 1 < len(surviving) else original.layer_count
            smaller = plan.layers[index].action != "keep"
            same = not tracks[0].differs and index == position
            before_a_cut = after > index + 1
            ahead = position + 1 if position + 1 < len(surviving) else None  # read while this layer is worked on
            if smaller or (scope == "all" and (before_a_cut or not same)):
                following = after if ahead is not None else None
                if scope != "all" and following is not None and plan.layers[following].action == "keep":
                    following = None  # the result alone passes it
                with original.layer(index, following) as reference, result.layer(position, ahead) as layer:
                    kept = (rows or {}).get(index, {})
                    pair = _Pair(reference, layer, index, position, after, tracks, calls, kept, refitted)
                    records += pair.refit()
                    pair.step()
            elif not same:
                with result.layer(position, ahead) as layer:
                    _step(layer, position, tracks, calls)
            _finish(steps, index, records[before_it:], tracks)
            advance()
        first = tracks[0]
        before = first.walk.losses(first.walk.boundary(original.layer_count))
        result_losses = first.walk.losses(first.room) if first.differs else before
    return Refit(records, before, result_losses)


def _finish(steps: Steps, index: int, records: Sequence[RefitRecord], tracks: Sequence[_Track]) -> None:
    """Finish a layer: what was solved, and the stream of the result behind it."""
    differ = [track for track in tracks if track.differs]

    def save(path: Path) -> None:
        path.mkdir(exist_ok=True)
        for number, track in enumerate(differ):
            track.room.save(path / str(number))

    record = {"records": [asdict(record) for record in records], "differs": bool(differ)}
    steps.finish(str(index), record, passing=save if differ else None)


def _resume(tracks: Sequence[_Track], last: Finished) -> None:
    """Take from an earlier run the stream of the result behind the last layer that it has finished."""
    for number, track in enumerate(tracks):
        track.differs = last.record["differs"]
        if track.differs:
            track.room.load(last.passing / str(number))


def check_windows(windows: int) -> None:
    """Raise `DataError` if there are too few calibration sequences for a refit."""
    if windows < LEAST_WINDOWS:
        raise DataError(
            f"--refit needs at least {LEAST_WINDOWS} calibration sequences, because it holds some out to choose its "
            f"ridges on, but there are {windows}; raise --samples, or pass --no-refit."
        )


def _step(layer: nn.Module, position: int, tracks: Sequence[_Track], calls: Rehearsal) -> None:
    """Take the result's stream of every track through a layer."""
    with torch.no_grad():
        for track in tracks:
            source = track.stream(position)
            for rows in track.walk.batches():
                after = calls.call(position, track.walk.tokens.inputs(rows))(layer, source.read(rows))
                track.room.write(rows, after)
            track.differs = True


@dataclass
class _Batch:
    """One micro-batch on both sides."""

    track: _Track
    rows: slice
    tokens: Tensor  # [B, S] bool: no padding
    held_out: Tensor  # [B, S] bool, a part of `tokens`
    reference: Tensor  # the original's stream before the layer [B, S, D]
    result: Tensor  # the result's stream before the layer [B, S, D]
    reference_call: LayerCall
    result_call: LayerCall

    @property
    def masks(self) -> tuple[Tensor, Tensor]:
        """Which tokens are for training, and which are held out, [B, S] bool each."""
        return self.tokens & ~self.held_out, self.held_out


_Rows = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What linears read [B, S, in] and what they should give [B, S, out], by linear."""


@dataclass
class _Pair:
    """A layer of the original and the same layer of the result, whose linears are re-solved in turn."""

    reference: nn.Module
    layer: nn.Module
    index: int  # in the original
    position: int  # in the result
    after: int  # boundary of the original that the layer of the result is to reach
    tracks: Sequence[_Track]
    calls: Rehearsal
    rows: Mapping[str, Tensor]  # of narrowed linears of the layer, the original's rows [n] that they have
    refitted: FactorStore  # where re-solved tensors go
    records: list[RefitRecord] = field(default_factory=list)

    def refit(self) -> list[RefitRecord]:
        """Re-solve queries, keys and values; attention out; gate and up; MLP down: each sees what those before give."""
        architecture, modules = self.tracks[0].walk.model.architecture, dict(self.reference.named_modules())
        *attention, attention_out = [name for name in architecture.attention if name in modules] or [""]
        *mlp, mlp_out = [name for name in architecture.mlp if name in modules] or [""]
        first = next(batch for batch, _present in self._rounds() if batch is not None)
        own = residual_scales(self.reference, attention_out, mlp_out, first.reference_call, first.reference)
        scales = scales_of_all(own)
        map_ = mlp_out.rpartition(".")[0] if mlp_out and not _has(self.layer, mlp_out) else ""  # in the MLP's place
        self._follow_outputs(attention)
        if scales is None:
            for group in ([attention_out], [map_] if map_ else mlp, [] if map_ else [mlp_out]):
                self._follow_outputs(group)
        else:
            self._follow_stream_after_attention(attention_out, mlp_out, scales)
            if not map_:
                self._follow_outputs(mlp)
            self._follow_stream_after_mlp(map_ or mlp_out, scales)
        self._follow_stream_after_experts()
        return self.records

    def step(self) -> None:
        """Take the result's stream through the layer as it now is."""
        _step(self.layer, self.position, self.tracks, self.calls)

    # -- what is re-solved -----------------------------------------------------------------------------------------

    def _follow_outputs(self, names: Sequence[str]) -> None:
        """Re-solve linears to give what the original's give, on the inputs that they have in the result."""
        names = [name for name in names if name and not self._gone(name)]

        def look(batch: _Batch) -> _Rows:
            seen = watch_linears(self.reference, names, batch.reference_call, batch.reference, until="outputs")
            biased = {name: self.layer if self._is_map(name) else self.reference for name in names}
            targets = {name: without_bias(seen.outputs[name], biased[name], name) for name in names}
            targets |= {name: targets[name][..., rows] for name, rows in self.rows.items() if name in targets}
            return self._inputs(names, batch), targets

        self._resolve(names, look)

    def _follow_stream_after_attention(self, name: str, mlp_out: str, scales: ResidualScales) -> None:
        """Re-solve the attention's output projection so that the stream after it is the original's.

        If nothing is left of the MLP, so that the stream after the layer is.
        """

        def look(batch: _Batch) -> _Rows:
            if self._gone(mlp_out):
                aim = wide(batch.track.walk.boundary(self.after).read(batch.rows))
            else:
                after, seen = run_watched(self.reference, [mlp_out], batch.reference_call, batch.reference)
                aim = wide(after) - scales.mlp * wide(seen.outputs[mlp_out])
            # The stream is large and what is added to it small: the difference is taken in float32 or better.
            target = (aim - wide(batch.result)) / scales.attention
            return self._inputs([name], batch), {name: without_bias(target, self.layer, name)}

        self._resolve([name], look)

    def _follow_stream_after_mlp(self, name: str, scales: ResidualScales) -> None:
        """Re-solve the MLP's output projection so that the stream after the layer is the original's after the cut."""

        def look(batch: _Batch) -> _Rows:
            after, seen = run_watched(self.layer, [name], batch.result_call, batch.result)
            aim = batch.track.walk.boundary(self.after).read(batch.rows)
            target = (wide(aim) - wide(after)) / scales.mlp + wide(seen.outputs[name])
            return seen.inputs, {name: without_bias(target, self.layer, name)}

        self._resolve([name], look)

    def _follow_stream_after_experts(self) -> None:
        """Re-solve the experts' output projections so that the stream after the layer is the original's after the cut.

        Where what they give is not plainly added to the stream, they stay as they are.
        """
        experts = experts_of(self.layer)
        if experts is None:
            return
        first = next(batch for batch, _present in self._rounds() if batch is not None)
        own = expert_scale(self.layer, experts, first.result_call, first.result)
        scale = parallel.from_first(lambda: own)  # of the first micro-batch of all
        if scale is None:
            return

        def rounds() -> Iterator[tuple[tuple[ExpertTokens, Tensor, Sequence[Tensor]] | None, int]]:
            for batch, present in self._rounds():
                if batch is None:
                    yield None, present
                    continue
                tokens = run_with_experts(self.layer, experts, batch.result_call, batch.result)
                aim = batch.track.walk.boundary(self.after).read(batch.rows)
                lacking = (wide(aim).flatten(0, 1) - wide(tokens.stream)) / scale
                yield (tokens, lacking, [mask.flatten() for mask in batch.masks]), present

        way = self.tracks[0].walk.settings.decomposition
        record = refit_experts(self.layer, experts, way, self.refitted.dtype, rounds, self.index)
        with parallel.together():
            if record.ridge is not None and parallel.is_first():
                down = self.layer.get_submodule(experts.module).get_parameter("down_proj")
                self.refitted.write_tensors(self.index, experts.module, {"down_proj": down})
        self.records.append(record)

    @torch.no_grad()
    def _resolve(self, names: Sequence[str], look: Callable[[_Batch], _Rows]) -> None:
        """Re-solve linears on what they read and should give, as `look` finds it, unless nothing is left of them."""
        if not names or self._gone(names[0]):
            return
        problems = LinearProblems(self.layer, names, self.tracks[0].walk.settings.decomposition)
        for batch, present in self._rounds():
            if batch is not None:
                problems.add(*look(batch), batch.masks)
            problems.end_round(present)
        records, owner_of = {}, problems.owner_of
        with parallel.together():
            for name, solution in problems.solve():
                if solution.ridge is not None:
                    weight = solved_weight(self.layer, name)
                    # Rounded as it will be stored, so that what follows sees what the saved model has.
                    weight.data = solution.weight.to(self.refitted.dtype).to(weight.dtype)
                    linear = self.layer.get_submodule(name)
                    own = (OUT_FACTOR, IN_FACTOR) if isinstance(linear, LowRankLinear) else ("weight",)
                    self.refitted.write_tensors(self.index, name, {each: linear.get_parameter(each) for each in own})
                records[name] = {
                    "ridge": solution.ridge,
                    "error_before": solution.error_before,
                    "error_after": solution.error_after,
                }
        for name, record in parallel.by_owner(owner_of, records).items():
            self.records.append(RefitRecord(layer=self.index, linear=name, **record))
            if record["ridge"] is not None:
                weight, owner = solved_weight(self.layer, name), owner_of[name]
                solved = weight.data if owner == parallel.group().rank else None
                weight.data = parallel.broadcast(solved, owner, weight.device)

    # -- the micro-batches -----------------------------------------------------------------------------------------

    def _rounds(self) -> Iterator[tuple[_Batch | None, int]]:
        """Yield of every round this process's micro-batch (None: it has none), and how many processes have one."""
        windows = sum(track.walk.all_tokens.sequences for track in self.tracks)
        every = _HELD_OUT if windows >= _HELD_OUT else 2
        for track in self.tracks:
            device = track.walk.model.device
            stream = track.stream(self.position)
            for rows, present in track.walk.share.rounds:
                if rows is None:
                    yield None, present
                    continue
                inputs = track.walk.tokens.inputs(rows)
                tokens = track.walk.tokens.valid[rows]
                held_out = tokens & track.held_out(rows, every)[:, None]
                batch = _Batch(
                    track=track,
                    rows=rows,
                    tokens=tokens.to(device),
                    held_out=held_out.to(device),
                    reference=track.walk.boundary(self.index).read(rows),
                    result=stream.read(rows),
                    reference_call=track.walk.rehearsal.call(self.index, inputs),
                    result_call=self.calls.call(self.position, inputs),
                )
                yield batch, present

    def _inputs(self, names: Sequence[str], batch: _Batch) -> dict[str, Tensor]:
        """Return what the linears read in the result [B, S, in]."""
        return watch_linears(self.layer, names, batch.result_call, batch.result, until="inputs").inputs

    def _is_map(self, name: str) -> bool:
        """Return whether the result has a linear map, with a bias of its own, where the original has an MLP."""
        return isinstance(self.layer.get_submodule(name), LowRankLinear) and any(
            True for _ in self.reference.get_submodule(name).children()
        )

    def _gone(self, name: str) -> bool:
        """Return whether nothing is left of a linear."""
        return _has(self.layer, name) and bool(getattr(self.layer.get_submodule(name), "rank", 1) == 0)


def _has(layer: nn.Module, name: str) -> bool:
    """Return whether a layer has a module of this name."""
    return any(name == other for other, _ in layer.named_modules())
