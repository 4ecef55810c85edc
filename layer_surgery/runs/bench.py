"""One opened checkpoint with its calibration data, the walk over them and their statistics: to score and operate on.

`compress`, `sweep`, `score` and the experiments work on one of these, so each of them does the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from layer_surgery import parallel
from layer_surgery.calibration.collector import composed
from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.config import BudgetConfig, CalibrationConfig, SearchConfig
from layer_surgery.data import load_documents, pack_evaluation
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import LayerSurgeryError, UserError
from layer_surgery.evaluation.expected import expected_rise
from layer_surgery.evaluation.vectors import text_vectors
from layer_surgery.journal import NOTHING_KEPT, Journal
from layer_surgery.records import (
    Interval,
    LayerPlan,
    LayerScores,
    Part,
    RefitRecord,
    RefitScope,
    SpectrumRecord,
    SurgeryPlan,
)
from layer_surgery.runs.session import Session
from layer_surgery.runs.survivors import check_what_stays, first_removable
from layer_surgery.scoring import SCORERS, ScoringContext
from layer_surgery.surgeon import METHODS, SurgeryContext, model_shape, plan_parameters
from layer_surgery.surgeon.components.whole import is_empty, output_projections
from layer_surgery.surgeon.refit import check_windows, refit
from layer_surgery.surgeon.resources import Pricing
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk

GENERAL_TEXT = "bundled"
#: Fewest windows of general text, where there is any (but no more than calibration sequences): with as many, one of
#: them is among those that ridges are chosen on.
LEAST_GENERAL = 8


@dataclass(frozen=True, kw_only=True)
class Result:
    """The model that surgery gives, and how. Its tensors are in scratch files of the session."""

    plan: SurgeryPlan  #: As carried out.
    checkpoint: Checkpoint
    refitted: list[RefitRecord] = field(default_factory=list)
    expected: Interval | None = None  #: Rise of the loss that a refit leaves on text like the calibration data.
    spectra: list[SpectrumRecord] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A checkpoint to score and operate on; see `open_bench`."""

    session: Session
    walk: Walk
    statistics: StatisticsSource
    general: PackedTokens | None = None  #: General text that a refit looks at beside the calibration tokens.
    journal: Journal = NOTHING_KEPT  #: What an earlier run of the same has finished.

    @property
    def model(self) -> StreamedModel:
        return self.walk.model

    def scores(
        self,
        scorer: str,
        count: int | None = None,
        *,
        keep: float = BudgetConfig.DEFAULT_KEEP,
        refit: bool = True,
        keep_boundaries: bool = False,
        known: dict[tuple[object, ...], LayerScores] | None = None,
    ) -> LayerScores:
        """Rank the layers.

        Args:
            scorer: name of the scorer.
            count: how many layers are to go; None if only the values are asked for.
            keep: fraction of a layer's parameters that low-rank components would get.
            refit: whether a refit follows the surgery.
            keep_boundaries: whether a later stage reads the hidden states at all layer boundaries.
            known: rankings of earlier calls by all that they depend on; the new one is added.
        """
        entry = SCORERS[scorer]
        context = ScoringContext(
            walk=self.walk,
            count=count,
            seed=self.session.runtime.seed,
            statistics=self.statistics,
            keep=keep,
            refit=refit,
            keep_boundaries=keep_boundaries,
        )
        key = (entry.name, *(getattr(context, name) for name in entry.depends_on))
        if known is None or key not in known:
            steps = self.journal.stage("scores", *key)
            before = steps.find("scores")
            with self.session.stage("score"):
                found = LayerScores(**before.record) if before is not None else entry.scores(context)
            steps.finish("scores", asdict(found))
            if known is None:
                return found
            known[key] = found
        return known[key]

    def first_removable(self, order: Sequence[int], count: int) -> list[int]:
        """Return the first layers of a removal order that can go together; see `first_removable` of `survivors.py`."""
        return first_removable(self.model, order, count, self.session.ui.note)

    def operate(
        self,
        plan: SurgeryPlan,
        method: str,
        refit_scope: RefitScope | None = None,
        *,
        ranks_fixed: bool = False,
        search: SearchConfig | None = None,
        pricing: Pricing | None = None,
    ) -> Result:
        """Carry out a plan on the original: the method, then the refit of `refit_scope` (None: none).

        `ranks_fixed` forbids the method to choose other ranks than the plan's; `search` says what one that searches may
        cut, and `pricing` what that takes of other resources than parameters.
        """
        check_what_stays(self.model, plan)
        session, entry = self.session, METHODS[method]
        inputs = plan.to_dict(), method, ranks_fixed, dict(pricing.totals) if pricing is not None else {}
        steps = self.journal.stage("surgery", *inputs)
        factors = FactorStore(steps.folder("factors") or session.new_scratch("factors"), session.checkpoint.dtype)
        spectra: list[SpectrumRecord] = []
        rows: dict[int, dict[str, Tensor]] = {}
        if plan.smaller or entry.removes:
            with session.stage("operate"):
                context = SurgeryContext(
                    walk=self.walk,
                    factors=factors,
                    statistics=self.statistics,
                    ranks_fixed=ranks_fixed,
                    search=search or SearchConfig(),
                    pricing=pricing or Pricing(),
                    rows=rows,
                    spectra=spectra,
                    steps=steps,
                    journal=self.journal,
                )
                plan = entry.function(plan, context)
                if not ranks_fixed:
                    plan = self._without_empty_layers(plan)
            # It waits for all, too: what others have written is there.
            parallel.agree({"another plan": plan.to_dict()}, "run all processes on machines of one kind")
        plan = replace(plan, refit=refit_scope or "none")
        checkpoint = result_checkpoint(session.checkpoint, plan, factors)
        if refit_scope is None:
            return Result(plan=plan, checkpoint=checkpoint, spectra=spectra)
        with session.stage("refit"), ExitStack() as stack:
            walks = [self.walk]
            if self.general is not None:
                walks.append(stack.enter_context(Walk(self.model, self.general, session.settings)))
            steps = self.journal.stage("refit", plan.to_dict())
            refitted = FactorStore(
                steps.folder("refitted") or session.new_scratch("refitted"), session.checkpoint.dtype
            )
            result = session.stream(checkpoint)
            found = refit(plan, walks, result, refitted, refit_scope, rows, steps=steps, journal=self.journal)
            parallel.barrier()
        checkpoint = result_checkpoint(session.checkpoint, plan, factors, refitted)
        expected = expected_rise(found.before, found.after, session.runtime.seed)
        return Result(plan=plan, checkpoint=checkpoint, refitted=found.records, spectra=spectra, expected=expected)

    @contextmanager
    def own_scratch(self, name: str) -> Iterator[Bench]:
        """Yield this bench for one of several results: with scratch files and statistics of its own, gone on exit."""
        with self.session.own_scratch(name) as session:
            statistics = self.statistics.branch(session.new_scratch("statistics"))
            yield replace(self, session=session, statistics=statistics)

    def _without_empty_layers(self, plan: SurgeryPlan) -> SurgeryPlan:
        """Return the plan with the layers removed that have neither attention nor MLP left, which do nothing.

        As it is, if the layers that stay would be others by that, or none would stay.
        """
        layers, architecture = self.session.checkpoint.layers, self.model.architecture
        gone = [layer.index for layer in plan.smaller if is_empty(layers[layer.index], layer, architecture)]
        empty = [index for index in gone if self._passes_on(index)]
        if not empty or len(empty) == len(plan.surviving):
            return plan
        shorter = [
            LayerPlan(index=each.index, action="remove") if each.index in empty else each for each in plan.layers
        ]
        without = replace(plan, layers=shorter)
        try:
            check_what_stays(self.model, without)
        except LayerSurgeryError:
            return plan
        return replace(without, parameters=plan_parameters(model_shape(self.session.checkpoint), without))

    @torch.no_grad()
    def _passes_on(self, index: int) -> bool:
        """Return whether a layer whose attention and MLP add nothing leaves the stream as it is: some scale it.

        Found by running the layer, so it holds for any architecture.
        """
        rows = slice(0, 1)
        with self.model.layer(index) as layer:
            names = output_projections(layer, self.model.architecture)
            nothing = {f"{n}.weight": torch.zeros_like(layer.get_parameter(f"{n}.weight")) for n in names}
            hidden = self.walk.rehearsal.embed(self.walk.tokens.inputs(rows))
            call = self.walk.rehearsal.call(index, self.walk.tokens.inputs(rows))
            with composed(layer, nothing):
                return torch.equal(call(layer, hidden), hidden)


@contextmanager
def open_bench(
    session: Session,
    tokens: PackedTokens | None,
    config: CalibrationConfig,
    *,
    part: Part = "layer",
    general: PackedTokens | None = None,
    base_sha256: str = "",
    maps: bool = False,
    journal: Journal = NOTHING_KEPT,
) -> Iterator[Bench]:
    """Yield a bench on a session's checkpoint.

    Args:
        tokens: calibration tokens; without any, a single dummy token stands in for them, which nothing looks at.
        config: where statistics are cached.
        part: part of the layers that costs are measured for.
        general: see `general_text`.
        base_sha256: hash of the checkpoint, if it is known already.
        maps: whether linear maps may take the place of MLPs.
        journal: what an earlier run of the same has finished.
    """
    if tokens is None:
        one = torch.zeros(1, 1, dtype=torch.int64)
        tokens = PackedTokens(
            name="none", token_ids=one, loss_mask=one > 0, valid=one > 0, tokens_available=0, sha256=""
        )
    statistics = StatisticsSource(
        session.new_scratch("statistics"),
        session.checkpoint.dtype,
        cache=config.cache,
        base_sha256=base_sha256,
        part=part,
        maps=maps,
        note=session.ui.note,
        journal=journal,
    )
    with Walk(session.stream(session.checkpoint), _taught(session, tokens), session.settings) as walk:
        yield Bench(session=session, walk=walk, statistics=statistics, general=general, journal=journal)


def _taught(session: Session, tokens: PackedTokens) -> PackedTokens:
    """Return texts for an embedding model with what it gives itself for each as the label; others as they are."""
    if tokens.objective.problem != "embedding":
        return tokens
    return replace(tokens, labels=text_vectors(session.stream(session.checkpoint), tokens, session.settings))


def general_text(session: Session, tokens: PackedTokens, share: float) -> PackedTokens | None:
    """Return the general text that a refit looks at: windows of the bundled text's calibration part.

    As many as `share` of the calibration sequences, but at least `LEAST_GENERAL`, if there are as many calibration
    sequences. None with a share of 0, beside calibration data that have it already, and for classifiers, which are
    made for one kind of text.
    Raises `DataError` for too few windows, `UserError` if a refit does not fit into memory.
    """
    check_windows(tokens.sequences)
    _check_memory(session)
    known = any(source.name == GENERAL_TEXT for source in tokens.sources)
    if not share or known or tokens.objective.labelled:
        return None
    general = pack_evaluation(
        load_documents(GENERAL_TEXT, part="calibration"),
        session.need_tokenizer(),
        sequence_length=tokens.sequence_length,
        max_windows=max(round(share * tokens.sequences), min(LEAST_GENERAL, tokens.sequences)),
        objective=tokens.objective,
        seed=session.runtime.seed,
    )
    session.ui.note(
        f"refit: on the calibration sequences and {general.sequences} of general text ('{GENERAL_TEXT}'; "
        "--refit-general 0 for none)"
    )
    return general


def _check_memory(session: Session) -> None:
    """Raise `UserError` if one layer of each model and the sums of its widest linear do not fit."""
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in session.checkpoint.layers)
    sums = [
        # training and held-out sums in float32, and the solution in float64
        2 * 4 * (in_ * in_ + out * in_) + 8 * (3 * in_ * in_ + out * in_)
        for layer in session.checkpoint.layers
        for out, in_ in (p.shape for p in layer.parameters() if p.dim() == 2)
    ]
    needed, available = 2 * largest * session.dtype.itemsize + max(sums, default=0), session.available_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"--refit holds a layer of the original, one of the result and the sums of one linear, "
            f"{needed:,} bytes, but --memory-limit (or what is free) is {available:,}; raise it, or pass --no-refit."
        )
