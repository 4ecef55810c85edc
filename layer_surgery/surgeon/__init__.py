"""Surgery: the plan, and the methods that make low-rank factors. Importing this package registers all methods."""

from layer_surgery.checkpoint.new_tensors import FactorStore

# In the order in which `--help` lists them.
from layer_surgery.surgeon import (  # isort: skip
    grasp,
    grasp_sequential,
    replaceme,
    laco,
    remove,
    svd,
    svd_llm,
    fisher,
)
from layer_surgery.surgeon.context import METHODS, Method, MethodEntry, SurgeryContext
from layer_surgery.surgeon.plan import LayerShape, ModelShape, check_plan, make_plan, plan_parameters, removal_count
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
    "fisher",
    "grasp",
    "grasp_sequential",
    "laco",
    "make_plan",
    "model_shape",
    "plan_parameters",
    "replaceme",
    "removal_count",
    "remove",
    "svd",
    "svd_llm",
]
