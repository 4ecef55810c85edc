"""The linears of a layer, by the names that an architecture has for them."""

from torch import nn


def plain_linears(layer: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Linear] | None:
    """Return those of the named modules that a layer has; None unless all are linears."""
    modules = dict(layer.named_modules())
    found = {name: module for name in names if isinstance(module := modules.get(name), nn.Linear)}
    return found if len(found) == sum(name in modules for name in names) else None
