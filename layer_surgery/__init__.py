"""Layer Surgery: task-aware SVD layer removal for causal language models."""

from layer_surgery.api import compress, evaluate, load, score
from layer_surgery.errors import LayerSurgeryError, UserError
from layer_surgery.records import (
    EvaluationResult,
    LayerPlan,
    LayerScores,
    Perplexity,
    SurgeryPlan,
    SurgeryReport,
)

__version__ = "0.1.0"

__all__ = [
    "EvaluationResult",
    "LayerPlan",
    "LayerScores",
    "LayerSurgeryError",
    "Perplexity",
    "SurgeryPlan",
    "SurgeryReport",
    "UserError",
    "__version__",
    "compress",
    "evaluate",
    "load",
    "score",
]
