"""Options on a checkpoint: how many layers go, what is refitted, which data are needed, and the plan. Runs no model."""

from dataclasses import replace

import attrs

from layer_surgery.checkpoint.open import Checkpoint
from layer_surgery.config import DEFAULT_METHOD, WHOLE_MODEL_METHOD, BudgetConfig, CompressConfig
from layer_surgery.errors import PlanError
from layer_surgery.records import LayerScores, RefitScope, SurgeryPlan
from layer_surgery.scoring import SCORERS
from layer_surgery.surgeon import METHODS, check_plan, make_plan, model_shape, plan_for_all_layers, removal_count


def checked(config: CompressConfig) -> CompressConfig:
    """Return the options, the method named. Raises `UserError` for those that do not go together; opens no model."""
    budget = BudgetConfig(**{field.name: getattr(config, field.name) for field in attrs.fields(BudgetConfig)})
    if config.plan is not None and budget != BudgetConfig():
        raise PlanError(
            "--plan says already which layers and ranks; leave out --target-layers, --layers, --keep, "
            "--target-parameters and --remove."
        )
    named = config.plan.plan.method if config.plan is not None else ""
    named = named or (WHOLE_MODEL_METHOD if of_all_layers(config) else DEFAULT_METHOD)
    config = attrs.evolve(config, method=config.method or named)
    if of_all_layers(config) and config.method != WHOLE_MODEL_METHOD:
        raise PlanError(
            f"--method {config.method} works on a number of layers; give --target-layers or --layers, or leave "
            f"--method out: --method {WHOLE_MODEL_METHOD} spreads the cut over all layers."
        )
    if of_all_layers(config) and config.remove != "layer":
        raise PlanError(f"--remove {config.remove} needs a number of layers; give --target-layers or --layers.")
    if config.method == WHOLE_MODEL_METHOD and config.remove != "layer":
        raise PlanError(f"--method {config.method} works on whole layers; leave out --remove {config.remove}.")
    scorer, method, part = SCORERS[config.scorer], METHODS[config.method or ""], config.remove
    if method.removes and (config.keep or config.target_parameters is not None):
        raise PlanError(
            f"--method {method.name} keeps nothing of the layers; leave out --keep and --target-parameters."
        )
    if part != "layer" and method.removes and method.name != "remove":
        raise PlanError(f"--method {method.name} works on whole layers; leave out --remove {part}.")
    if part != "layer" and config.plan is None and config.layers is None and not scorer.parts:
        able = ", ".join(entry.name for entry in SCORERS if entry.parts)
        raise PlanError(
            f"--scorer {scorer.name} ranks whole layers; for --remove {part} take one of {able}, or name --layers."
        )
    return config


def of_all_layers(config: CompressConfig) -> bool:
    """Return whether a budget for the whole model is all that is asked for, so that every layer takes part."""
    others = (config.target_layers, config.layers, config.plan)
    return config.target_parameters is not None and all(option is None for option in others)


class Planning:
    """The decisions that options come to on a checkpoint. The options have been through `checked`."""

    def __init__(self, config: CompressConfig, checkpoint: Checkpoint) -> None:
        """Decide what can be decided without scores. Raises `PlanError` for what cannot be done."""
        assert config.method is not None
        self.config, self.checkpoint, self.method = config, checkpoint, METHODS[config.method]
        self.trial = self._trial_plan()
        """The given plan, or one for the layers that come first, so that an impossible budget stops here. It tells how
        many layers go, whether anything becomes low-rank, and about how large the result is."""
        if self.chooses and self.trial.low_rank and checkpoint.low_rank:
            raise PlanError(
                f"{checkpoint.name} has low-rank layers already, which a scorer cannot choose again; name "
                "the layers (compress --layers), remove outright with --keep 0 --scorer block_influence, or start from "
                "the original."
            )
        self.refit_scope = self._refit_scope()

    @property
    def chooses(self) -> bool:
        """Whether the scorer chooses the layers."""
        return self.config.plan is None and self.config.layers is None and not of_all_layers(self.config)

    @property
    def needs_data(self) -> bool:
        """Whether anything looks at calibration data."""
        return (
            self.refit_scope is not None
            or (self.method.needs_data and bool(self.trial.smaller or self.method.removes))
            or (self.chooses and SCORERS[self.config.scorer].needs_data)
        )

    @property
    def ranked_keep(self) -> float:
        """Kept fraction that layers are ranked at: that of the budget, with two exceptions.

        Removed outright before a refit, they are ranked as if a tenth were kept: on development text this chose better
        layers, because the refit makes up for much of what the rest does. A budget of the whole model says nothing.
        """
        keep = 0.0 if self.method.removes else self.config.keep
        if keep == 0 and self.refit_scope is None:
            return 0.0
        return keep or BudgetConfig.DEFAULT_KEEP

    @property
    def keep_boundaries(self) -> bool:
        """Whether the method reads the hidden states at all layer boundaries."""
        return bool(self.trial.smaller) and self.method.needs_boundaries

    def plan(self, scores: LayerScores | None, base_sha256: str) -> SurgeryPlan:
        """Return the plan; `scores` choose the layers if the user does not."""
        config = self.config
        if config.plan is not None or of_all_layers(config):
            plan = replace(self.trial, method=self.method.name)
        else:
            chosen = config.layers or (scores.removal_order[: len(self.trial.operated)] if scores else ())
            plan = make_plan(model_shape(self.checkpoint, config.remove), chosen, self._budget(), self.method.name)
        return replace(plan, base_sha256=base_sha256)

    def _trial_plan(self) -> SurgeryPlan:
        config = self.config
        if config.plan is not None:
            plan = check_plan(model_shape(self.checkpoint), config.plan.plan, config.plan.name)
            if any(layer.channels for layer in plan.smaller) and self.method.name != WHOLE_MODEL_METHOD:
                raise PlanError(
                    f"{config.plan.name} has layers with fewer channels, which --method {WHOLE_MODEL_METHOD} makes; "
                    f"leave out --method {self.method.name}."
                )
            if plan.low_rank and self.method.removes:
                raise PlanError(f"{config.plan.name} has low-rank layers, but --method {self.method.name} makes none.")
            return plan
        shape = model_shape(self.checkpoint, config.remove)
        if of_all_layers(config):
            return plan_for_all_layers(shape, config, self.method.name)
        count = removal_count(config, self.checkpoint.layer_count)
        untouched = [index for index, layer in enumerate(shape.layers) if layer.linears]
        stand_ins = (untouched + [index for index in range(len(shape.layers)) if index not in untouched])[:count]
        return make_plan(shape, config.layers or stand_ins, self._budget(), self.method.name)

    def _budget(self) -> BudgetConfig:
        return attrs.evolve(self.config, keep=0.0) if self.method.removes else self.config

    def _refit_scope(self) -> RefitScope | None:
        """Return what is refitted: as the user says, else as the given plan says, else as the method does."""
        wanted, scope = self.config.refit, self.config.refit_scope
        given = self.config.plan.plan.refit if self.config.plan is not None else ""
        if wanted is None and given:
            return None if given == "none" else given
        if not (self.method.refits if wanted is None else wanted):
            return None
        if scope == "operated" and not self.trial.smaller:
            raise PlanError(
                "--refit-scope operated refits low-rank layers, and nothing becomes low-rank here; take "
                "--refit-scope all or --no-refit."
            )
        return scope
