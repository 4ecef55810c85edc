"""Surgery: the plan, and the methods that make low-rank factors. Importing this package registers all methods."""

from layer_surgery.checkpoint.new_tensors import FactorStore
from layer_surgery.surgeon import (  # noqa: F401
    fisher,
    grasp,
    grasp_sequential,
    laco,
    mix,
    remove,
    replaceme,
    svd,
    svd_llm,
)
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
