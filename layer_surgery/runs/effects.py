"""Options that would change nothing beside the others that are given: refused, for they are misunderstandings."""

import attrs

from layer_surgery.config import DEFAULT_METHOD, DEFAULT_SCORER, CompressConfig, SearchConfig
from layer_surgery.config.surgery import RefitConfig
from layer_surgery.errors import PlanError
from layer_surgery.surgeon import METHODS


def check_effects(config: CompressConfig) -> None:
    """Raise `PlanError` for an option that would have no effect. The method of the options is named.

    A sweep has points of several methods, to some of which an option says nothing; it does not ask here. The options
    that a plan was searched with may be given again with it.
    """
    method = METHODS[config.method or DEFAULT_METHOD]
    searching = _given(config, SearchConfig)
    if searching and not method.searches and config.plan is None:
        raise PlanError(
            f"{searching[0]} is for --method {DEFAULT_METHOD}; leave it out, or leave out --method {method.name}."
        )
    if config.scorer != DEFAULT_SCORER:
        reason = (
            "--plan says already which layers are changed"
            if config.plan is not None
            else "--layers names the layers"
            if config.layers is not None
            else "all layers take part without --target-layers"
            if config.of_all_layers
            else None
        )
        if reason is not None:
            raise PlanError(f"--scorer {config.scorer} would have nothing to choose: {reason}; leave it out.")
    refitting = [option for option in _given(config, RefitConfig) if option != "--refit"]
    if not refitting or not config.refit_general:  # no general text is what there is without a refit, too
        return
    if config.refit is None and config.plan is not None and config.plan.plan.refit:
        raise PlanError(f"--plan says already what is refitted; leave out {refitting[0]}, or pass --refit too.")
    if not (method.refits if config.refit is None else config.refit):
        advice = "leave out --no-refit" if config.refit is False else "pass --refit too"
        raise PlanError(f"{refitting[0]} says how to refit, and nothing is refitted; leave it out, or {advice}.")


def _given(config: CompressConfig, group: type[attrs.AttrsInstance]) -> list[str]:
    """Return the options of a group that have another value than their default."""
    return [
        f"--{field.name.replace('_', '-')}"
        for field in attrs.fields(group)
        if getattr(config, field.name) != field.default
    ]
