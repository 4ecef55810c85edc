"""From a plan to the operated model: the method, then the refit. Used by every command that operates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.checkpoint.open import Checkpoint
from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.data import load_documents, pack_evaluation
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import UserError
from layer_surgery.records import Part, RefitRecord, RefitScope, SpectrumRecord, SurgeryPlan
from layer_surgery.runs.session import Session
from layer_surgery.surgeon import MethodEntry, SurgeryContext
from layer_surgery.surgeon.refit import check_windows, refit
from layer_surgery.walk.walk import Walk

GENERAL_TEXT = "bundled"
#: Fewest windows of general text, where there is any (but no more than calibration sequences): with as many, one of
#: them is among those that ridges are chosen on.
LEAST_GENERAL = 8


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What was done, and the model that it gives. Its tensors are in scratch files of the session."""

    plan: SurgeryPlan
    checkpoint: Checkpoint
    refitted: list[RefitRecord]
    spectra: list[SpectrumRecord]


@dataclass(frozen=True, kw_only=True)
class RefitData:
    """What a refit looks at, and what it may change."""

    scope: RefitScope
    general: PackedTokens | None
    """None if there is none beside the calibration tokens."""


def operate(
    session: Session,
    walk: Walk,
    plan: SurgeryPlan,
    method: MethodEntry,
    statistics: StatisticsSource,
    *,
    refit_data: RefitData | None = None,
    ranks_fixed: bool = False,
) -> Operation:
    """Carry out a plan on the original that `walk` walks over."""
    directory = session.new_scratch("factors")
    factors = FactorStore(directory, session.checkpoint.dtype)
    spectra: list[SpectrumRecord] = []
    if plan.low_rank or method.removes:
        with session.clock.stage("operate"):
            context = SurgeryContext(
                walk=walk,
                factors=factors,
                statistics=statistics,
                ranks_fixed=ranks_fixed,
                spectra=spectra,
            )
            plan = method.function(plan, context)
    operated = result_checkpoint(session.checkpoint, plan, factors)
    plan = replace(plan, refit="none" if refit_data is None else refit_data.scope)
    if refit_data is None:
        return Operation(plan=plan, checkpoint=operated, refitted=[], spectra=spectra)
    with session.clock.stage("refit"), _walks(session, walk, refit_data) as walks:
        refitted = FactorStore(session.new_scratch("refitted"), session.checkpoint.dtype)
        records = refit(plan, walks, session.stream(operated), refitted, refit_data.scope)
    operated = result_checkpoint(session.checkpoint, plan, factors, refitted)
    return Operation(plan=plan, checkpoint=operated, refitted=records, spectra=spectra)


def refit_data(session: Session, tokens: PackedTokens, scope: RefitScope, general_share: float) -> RefitData:
    """Return what a refit looks at: the calibration sequences, and as a share of their number general text.

    At least `LEAST_GENERAL` windows of it, if there are as many calibration sequences.

    That is the bundled text's calibration part. There is none beside calibration data that has it already.
    Raises `DataError` for too few windows.
    """
    check_windows(tokens.sequences)
    _check_memory(session)
    wanted = max(round(general_share * tokens.sequences), min(LEAST_GENERAL, tokens.sequences))
    if not general_share or any(source.name == GENERAL_TEXT for source in tokens.sources):
        return RefitData(scope=scope, general=None)
    general = pack_evaluation(
        load_documents(GENERAL_TEXT, part="calibration"),
        session.need_tokenizer(),
        sequence_length=tokens.sequence_length,
        max_windows=wanted,
    )
    session.ui.note(
        f"refit: on the calibration sequences and {general.sequences} of general text ('{GENERAL_TEXT}'; "
        "--refit-general 0 for none)"
    )
    return RefitData(scope=scope, general=general)


def _check_memory(session: Session) -> None:
    """Raise `UserError` if one layer of each model and the sums of its widest linear do not fit."""
    dtype = session.runtime.torch_dtype(session.device, session.checkpoint.dtype)
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in session.checkpoint.layers)
    sums = [
        # training and held-out sums in float32, and the solution in float64
        2 * 4 * (in_ * in_ + out * in_) + 8 * (3 * in_ * in_ + out * in_)
        for layer in session.checkpoint.layers
        for out, in_ in (p.shape for p in layer.parameters() if p.dim() == 2)
    ]
    needed, available = 2 * largest * dtype.itemsize + max(sums, default=0), session.available_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"--refit holds a layer of the original, one of the result and the sums of one linear, "
            f"{needed:,} bytes, but --memory-limit (or what is free) is {available:,}; raise it, or pass --no-refit."
        )


@contextmanager
def _walks(session: Session, walk: Walk, data: RefitData) -> Iterator[list[Walk]]:
    with ExitStack() as stack:
        walks = [walk]
        if data.general is not None:
            walks.append(stack.enter_context(Walk(walk.model, data.general, session.settings)))
        yield walks


def statistics_source(session: Session, base_sha256: str, cache: Path | None, part: Part = "layer") -> StatisticsSource:
    """Return where this session's statistics come from."""
    return StatisticsSource(
        session.new_scratch("statistics"),
        session.checkpoint.dtype,
        cache=cache,
        base_sha256=base_sha256,
        part=part,
        note=session.ui.note,
    )
