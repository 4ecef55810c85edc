"""Surgery: the plan, and the methods that make low-rank factors. Importing this package registers all methods."""

from layer_surgery.factors import FactorStore
from layer_surgery.surgeon import grasp, laco, replaceme, svd, whitened
from layer_surgery.surgeon.context import METHODS, Method, SurgeryContext
from layer_surgery.surgeon.plan import LayerShape, ModelShape, check_plan, make_plan, plan_parameters, removal_count
from layer_surgery.surgeon.shape import model_shape

__all__ = [
    "METHODS",
    "FactorStore",
    "LayerShape",
    "Method",
    "ModelShape",
    "SurgeryContext",
    "check_plan",
    "grasp",
    "laco",
    "make_plan",
    "model_shape",
    "plan_parameters",
    "replaceme",
    "removal_count",
    "svd",
    "whitened",
]
