"""Options on a checkpoint: how many layers go, what is refitted, which data are needed, and the plan. Runs no model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import attrs
import torch

from layer_surgery.calibration.statistics import check_tokens
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.checkpoint.size_fields import plain_kinds
from layer_surgery.config import DEFAULT_METHOD, BudgetConfig, CompressConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import PlanError
from layer_surgery.records import LayerScores, RefitScope, SurgeryPlan
from layer_surgery.scoring import SCORERS, check_linears
from layer_surgery.surgeon import (
    METHODS,
    LayerShape,
    ModelShape,
    check_plan,
    make_plan,
    model_shape,
    plan_to_search,
    removal_count,
)
from layer_surgery.surgeon.division import find
from layer_surgery.surgeon.plan import runs_behind_a_layer
from layer_surgery.surgeon.resources import CACHE, FLOPS, TIME, pricing_of


def checked(config: CompressConfig) -> CompressConfig:
    """Return the options, the method named. Raises `UserError` for those that do not go together; opens no model."""
    budget = BudgetConfig(**{field.name: getattr(config, field.name) for field in attrs.fields(BudgetConfig)})
    if config.plan is not None and budget != BudgetConfig():
        raise PlanError(
            "--plan says already which layers and ranks; leave out --target-layers, --layers, --keep, "
            "--target-parameters, the other targets and --remove."
        )
    named = config.plan.plan.method if config.plan is not None else ""
    config = attrs.evolve(config, method=config.method or named or DEFAULT_METHOD)
    scorer, method, part = SCORERS[config.scorer], METHODS[config.method or ""], config.remove
    if config.of_all_layers and not method.searches:
        raise PlanError(
            f"--method {config.method} works on a number of layers; give --target-layers or --layers, or leave "
            f"--method out: --method {DEFAULT_METHOD} spreads the cut over all layers."
        )
    if config.other_targets and not method.searches:
        option = f"--{min(config.other_targets).replace('_', '-')}"
        raise PlanError(f"{option} needs a method that searches; leave out --method {method.name}.")
    if config.uniform and config.plan is None and not config.of_all_layers:
        raise PlanError(
            "--uniform gives all layers one width, so all take part; leave out --target-layers and --layers, and give "
            "--target-parameters or another target."
        )
    if method.removes and (config.keep or config.target_parameters is not None or config.target_size is not None):
        raise PlanError(
            f"--method {method.name} keeps nothing of the layers; leave out --keep, --target-parameters and "
            "--target-size."
        )
    if part != "layer" and method.removes and method.name != "remove":
        raise PlanError(f"--method {method.name} works on whole layers; leave out --remove {part}.")
    if part != "layer" and config.plan is None and config.layers is None and not scorer.parts:
        able = ", ".join(entry.name for entry in SCORERS if entry.parts)
        raise PlanError(
            f"--scorer {scorer.name} ranks whole layers; for --remove {part} take one of {able}, or name --layers."
        )
    return config


class Planning:
    """The decisions that options come to on a checkpoint. The options have been through `checked`."""

    def __init__(self, config: CompressConfig, checkpoint: Checkpoint, device: torch.device) -> None:
        """Decide what can be decided without scores. Raises `PlanError` for what cannot be done.

        Times are measured on `device`, if a target needs them.
        """
        assert config.method is not None
        self.config, self.checkpoint, self.method = config, checkpoint, METHODS[config.method]
        named = {"target_flops": FLOPS, "target_kv_cache": CACHE, "target_time": TIME}
        targets = {named[name]: share for name, share in config.other_targets.items()}
        dtype = config.torch_dtype(device, checkpoint.dtype, checkpoint.hidden_size)
        self.pricing = pricing_of(checkpoint, targets, config.sequence_length, device, dtype)
        self.bounds = {resource: share * self.pricing.totals[resource] for resource, share in targets.items()}
        self.trial = self._trial_plan()
        """The given plan, or one for the layers that come first, so that an impossible budget stops here. It tells how
        many layers go, whether anything becomes low-rank, and about how large the result is."""
        if self.chooses and self.trial.smaller and checkpoint.low_rank:
            raise PlanError(
                f"{checkpoint.name} has low-rank layers already, which a scorer cannot choose again; name "
                "the layers (compress --layers), remove outright with --keep 0 --scorer block_influence, or start from "
                "the original."
            )
        if self.chooses:
            layers = model_shape(checkpoint, config.remove).layers
            check_linears(config.scorer, {index: layer.linears for index, layer in enumerate(layers)})
        elif self.method.behind:
            runs_behind_a_layer(replace(self.trial, method=self.method.name))
        self.refit_scope = self._refit_scope()

    @property
    def chooses(self) -> bool:
        """Whether the scorer chooses the layers."""
        return self.config.plan is None and self.config.layers is None and not self.config.of_all_layers

    @property
    def needs_data(self) -> bool:
        """Whether anything looks at calibration data."""
        return (
            self.refit_scope is not None
            or (self.method.needs_data and bool(self.trial.smaller or self.method.removes))
            or (self.chooses and SCORERS[self.config.scorer].needs_data)
        )

    def check_tokens(self, tokens: PackedTokens | None) -> None:
        """Raise `DataError` if there are too few calibration tokens for the second moments that are taken of them."""
        cuts = any(layer.units or any(layer.ranks.values()) for layer in self.trial.smaller)
        takers = [f"--scorer {self.config.scorer}"] if self.chooses and SCORERS[self.config.scorer].moments else []
        if self.method.moments and (cuts or self.method.removes):
            takers.append(f"--method {self.method.name}")
        if tokens is not None and takers:
            check_tokens(tokens, self.checkpoint.hidden_size, takers[0])

    @property
    def needs_maps(self) -> bool:
        """Whether a linear map may take the place of an MLP."""
        planned = any(layer.bypass is not None for layer in self.trial.layers)
        return planned or (self.method.searches and self.config.bypasses)

    @property
    def ranking(self) -> dict[str, Any]:
        """What a bench is asked to rank the layers by."""
        return {
            "scorer": self.config.scorer,
            "count": len(self.trial.operated),
            "keep": self._ranked_keep,
            "refit": self.refit_scope is not None,
            "keep_boundaries": bool(self.trial.smaller) and self.method.needs_boundaries,
        }

    @property
    def surgery(self) -> dict[str, Any]:
        """How a bench is to carry out the plan."""
        return {
            "method": self.method.name,
            "refit_scope": self.refit_scope,
            "ranks_fixed": self.config.plan is not None,
            "search": self.config,
            "pricing": self.pricing,
        }

    @property
    def _ranked_keep(self) -> float:
        """Kept fraction that layers are ranked at: that of the budget, with two exceptions.

        Removed outright before a refit, they are ranked as if a tenth were kept: on development text this chose better
        layers, because the refit makes up for much of what the rest does. A budget of the whole model says nothing.
        """
        keep = 0.0 if self.method.removes else self.config.keep
        if keep == 0 and self.refit_scope is None:
            return 0.0
        return keep or BudgetConfig.DEFAULT_KEEP

    def plan(
        self,
        scores: LayerScores | None,
        base_sha256: str,
        first_removable: Callable[[Sequence[int], int], Sequence[int]],
    ) -> SurgeryPlan:
        """Return the plan; `scores` choose the layers if the user does not.

        `first_removable` returns so many layers of a removal order that can go together, the first that can.
        """
        config = self.config
        if config.plan is not None or config.of_all_layers:
            plan = replace(self.trial, method=self.method.name)
        else:
            chosen: Sequence[int] = config.layers or ()
            if scores is not None and not chosen:
                count = len(self.trial.operated)
                removes = len(self.trial.surviving) < len(self.trial.layers)
                order = scores.removal_order
                chosen = first_removable(order, count) if removes else order[:count]
            plan = self._made(model_shape(self.checkpoint, config.remove), chosen)
        return replace(plan, base_sha256=base_sha256)

    def _made(self, shape: ModelShape, chosen: Sequence[int]) -> SurgeryPlan:
        """Return the plan that operates on these layers."""
        if self.method.searches:
            return plan_to_search(shape, chosen, self._budget(), self.method.name, self.bounds)
        return make_plan(shape, chosen, self._budget(), self.method.name)

    def _trial_plan(self) -> SurgeryPlan:
        config = self.config
        if config.plan is not None:
            plan = check_plan(model_shape(self.checkpoint), config.plan.plan, config.plan.name)
            if any(layer.units for layer in plan.smaller) and not self.method.searches:
                raise PlanError(
                    f"{config.plan.name} has layers with fewer channels or heads, which --method {DEFAULT_METHOD} "
                    f"makes; leave out --method {self.method.name}."
                )
            if plan.low_rank and self.method.removes:
                raise PlanError(f"{config.plan.name} has low-rank layers, but --method {self.method.name} makes none.")
            return plan
        shape = model_shape(self.checkpoint, config.remove)
        untouched = [index for index, layer in enumerate(shape.layers) if layer.linears]
        if config.of_all_layers:
            trial = self._made(shape, untouched)
        else:
            count = removal_count(config, self.checkpoint.layer_count)
            stand_ins = (untouched + [index for index in range(len(shape.layers)) if index not in untouched])[:count]
            trial = self._made(shape, config.layers or stand_ins)
        self._check_reachable(trial, shape)
        by_layer = config.target_parameters is None and config.target_size is None and not self.bounds
        if self.chooses and SCORERS[config.scorer].needs_data and by_layer and trial.smaller:
            self._check_each_kind(shape, untouched)
        return trial

    def _check_reachable(self, plan: SurgeryPlan, shape: ModelShape) -> None:
        """Raise `PlanError` for a budget that no search can keep; one that is not searched for is checked as made."""
        if self.method.searches and any(layer.action == "reduce" for layer in plan.layers):
            plain = plain_kinds(self.checkpoint) if self.config.uniform else ()
            find(plan, shape, self.checkpoint.architecture, self.config, self.pricing, plain=plain)

    def _check_each_kind(self, shape: ModelShape, layers: Sequence[int]) -> None:
        """Raise `PlanError` unless `--keep` can be reached in each of these layers alone, and so in whichever of them
        the scorer, which takes its time, will choose."""
        kinds: list[LayerShape] = []
        for index in layers:
            if shape.layers[index] in kinds:
                continue
            kinds.append(shape.layers[index])
            try:
                self._check_reachable(self._made(shape, [index]), shape)
            except PlanError as error:
                raise PlanError(f"if --scorer {self.config.scorer} chooses layer {index}, {error}") from error

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
