"""One set of options on an opened checkpoint: which layers, which ranks, and carrying it out. Writes no model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from layer_surgery.calibration.source import StatisticsSource
from layer_surgery.checkpoint.open import Checkpoint
from layer_surgery.checkpoint.result import result_checkpoint
from layer_surgery.config import DEFAULT_METHOD, BudgetConfig, CompressConfig
from layer_surgery.errors import PlanError
from layer_surgery.records import LayerScores, RefitScope, SurgeryPlan
from layer_surgery.runs.operation import Operation, RefitData, operate
from layer_surgery.runs.session import Session
from layer_surgery.scoring import SCORERS, ScorerEntry, ScoringContext
from layer_surgery.surgeon import METHODS, MethodEntry, check_plan, make_plan, model_shape, removal_count
from layer_surgery.walk.self_check import check_survivors
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk


def check_options(config: CompressConfig) -> None:
    """Raise `UserError` for options that do not go together; needs no model."""
    scorer, method = SCORERS[config.scorer], METHODS[config.method or DEFAULT_METHOD]
    if method.removes and (config.budget.keep or config.budget.target_parameters is not None):
        raise PlanError(
            f"--method {method.name} keeps nothing of the layers; leave out --keep and --target-parameters."
        )
    part = config.budget.remove
    if part == "layer":
        return
    if method.removes and method.name != "remove":
        raise PlanError(f"--method {method.name} works on whole layers; leave out --remove {part}.")
    if config.plan is None and config.budget.layers is None and not scorer.parts:
        able = ", ".join(entry.name for entry in SCORERS if entry.parts)
        raise PlanError(
            f"--scorer {scorer.name} ranks whole layers; for --remove {part} take one of {able}, or name --layers."
        )


@dataclass
class Compression:
    """What options come to on this checkpoint. `config.method` is a name here, and `check_options` has passed."""

    config: CompressConfig
    session: Session

    @property
    def checkpoint(self) -> Checkpoint:
        return self.session.checkpoint

    @property
    def given(self) -> SurgeryPlan | None:
        """The user's own plan."""
        return self.config.plan

    @property
    def scorer(self) -> ScorerEntry:
        return SCORERS[self.config.scorer]

    @property
    def method(self) -> MethodEntry:
        return METHODS[self.config.method or DEFAULT_METHOD]

    @property
    def chooses(self) -> bool:
        """Whether the scorer chooses the layers."""
        return self.given is None and self.config.budget.layers is None

    def trial_plan(self) -> SurgeryPlan:
        """Return the given plan, or one for the layers that come first, so that an impossible budget stops here.

        It tells how many layers go, whether anything becomes low-rank, and about how large the result is.
        """
        trial = self._trial_plan()
        if self.chooses and trial.low_rank and self.checkpoint.low_rank:
            raise PlanError(
                f"{self.checkpoint.name} has low-rank layers already, which a scorer cannot choose again; name "
                "the layers (compress --layers), remove outright with --keep 0 --scorer block_influence, or start from "
                "the original."
            )
        return trial

    def _trial_plan(self) -> SurgeryPlan:
        shape = model_shape(self.checkpoint, self.config.budget.remove)
        if self.given is not None:
            plan = check_plan(model_shape(self.checkpoint), self.given, self.config.plan_name)
            if plan.low_rank and self.method.removes:
                raise PlanError(
                    f"{self.config.plan_name} has low-rank layers, but --method {self.method.name} makes none."
                )
            return plan
        count = removal_count(self.config.budget, self.checkpoint.layer_count)
        untouched = [index for index, layer in enumerate(shape.layers) if layer.linears]
        stand_ins = (untouched + [index for index in range(len(shape.layers)) if index not in untouched])[:count]
        return make_plan(shape, self.config.budget.layers or stand_ins, self._budget(), self.method.name)

    def refit_scope(self, trial: SurgeryPlan) -> RefitScope | None:
        """Return what is refitted: as the user says, else as the given plan says, else as the method does."""
        wanted, scope = self.config.refit.enabled, self.config.refit.scope
        if wanted is None and self.given is not None and self.given.refit:
            return None if self.given.refit == "none" else self.given.refit
        if not (self.method.refits if wanted is None else wanted):
            return None
        if scope == "operated" and not trial.low_rank:
            raise PlanError(
                "--refit-scope operated refits low-rank layers, and nothing becomes low-rank here; take "
                "--refit-scope all or --no-refit."
            )
        return scope

    def needs_data(self, trial: SurgeryPlan) -> bool:
        """Whether anything looks at calibration data."""
        return (
            self.refit_scope(trial) is not None
            or (self.method.needs_data and bool(trial.low_rank or self.method.removes))
            or (self.chooses and self.scorer.needs_data)
        )

    def scoring_context(self, walk: Walk, statistics: StatisticsSource, trial: SurgeryPlan) -> ScoringContext:
        """Return what the scorer is given."""
        return ScoringContext(
            walk=walk,
            count=len(trial.operated),
            seed=self.config.runtime.seed,
            statistics=statistics,
            keep=self._ranked_keep(trial),
            refit=self.refit_scope(trial) is not None,
            keep_boundaries=bool(trial.low_rank) and self.method.needs_boundaries,
        )

    def _ranked_keep(self, trial: SurgeryPlan) -> float:
        """Return the kept fraction that layers are ranked at: that of the budget, with two exceptions.

        Removed outright before a refit, they are ranked as if a tenth were kept: on development text this chose better
        layers, because the refit makes up for much of what the rest does. A budget of the whole model says nothing.
        """
        keep = 0.0 if self.method.removes else self.config.budget.keep
        if keep == 0 and self.refit_scope(trial) is None:
            return 0.0
        return keep or BudgetConfig.DEFAULT_KEEP

    def scores(self, context: ScoringContext) -> LayerScores:
        """Rank the layers."""
        with self.session.clock.stage("score"):
            return self.scorer.scores(context)

    def carry_out(
        self,
        walk: Walk,
        statistics: StatisticsSource,
        scores: LayerScores | None,
        refit_data: RefitData | None,
        *,
        trial: SurgeryPlan,
        base_sha256: str,
    ) -> Operation:
        """Plan and operate on the original that `walk` walks over. `scores` choose the layers if the user does not."""
        plan = replace(self._plan(scores, len(trial.operated)), base_sha256=base_sha256)
        self._check_survivors(plan, walk.model)
        return operate(
            self.session,
            walk,
            plan,
            self.method,
            statistics,
            refit_data=refit_data,
            ranks_fixed=self.given is not None,
        )

    def _budget(self) -> BudgetConfig:
        budget = self.config.budget
        return replace(budget, keep=0.0) if self.method.removes else budget

    def _plan(self, scores: LayerScores | None, count: int) -> SurgeryPlan:
        if self.given is not None:
            plan = check_plan(model_shape(self.checkpoint), self.given, self.config.plan_name)
            return replace(plan, method=self.method.name)
        shape = model_shape(self.checkpoint, self.config.budget.remove)
        chosen = self.config.budget.layers or (scores.removal_order[:count] if scores else ())
        return make_plan(shape, chosen, self._budget(), self.method.name)

    def _check_survivors(self, plan: SurgeryPlan, model: StreamedModel) -> None:
        """Check that the layers that stay are not changed by the going of others, before anything is computed."""
        if len(plan.surviving) == len(plan.layers):
            return
        kept = [replace(layer, action="keep", ranks={}) if layer.ranks else layer for layer in plan.layers]
        rest = result_checkpoint(self.checkpoint, replace(plan, layers=kept))
        operated = StreamedModel(rest, device=model.device, dtype=model.dtype)
        check_survivors(model, operated, plan.surviving)
