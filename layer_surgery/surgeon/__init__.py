"""Surgery: the plan, and the methods that make low-rank factors. Importing this package registers all methods."""

from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.surgeon.context import METHODS, Method, MethodEntry, SurgeryContext
from layer_surgery.surgeon.plan import (
    LayerShape,
    ModelShape,
    check_plan,
    make_plan,
    plan_parameters,
    plan_to_search,
    removal_count,
)
from layer_surgery.surgeon.shape import model_shape

# In the order in which `--help` lists them.
# isort: off
from layer_surgery.surgeon import grasp, grasp_sequential, replaceme, laco, mix, remove, svd, svd_llm, fisher  # noqa: F401
# isort: on

__all__ = [
    "METHODS",
    "FactorStore",
    "LayerShape",
    "Method",
    "MethodEntry",
    "ModelShape",
    "SurgeryContext",
    "check_plan",
    "make_plan",
    "model_shape",
    "plan_parameters",
    "plan_to_search",
    "removal_count",
]
