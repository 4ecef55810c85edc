"""Kinds of components that the search may keep or leave out. Importing this package registers all kinds."""

from layer_surgery.surgeon.components.kind import KINDS, Kind, PartOfLayer

# In the order in which the search asks them.
# isort: off
from layer_surgery.surgeon.components import channels, singular, heads, whole, experts, routed, bypass  # noqa: F401
# isort: on

__all__ = ["KINDS", "Kind", "PartOfLayer"]
