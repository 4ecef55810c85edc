"""Layer Surgery: task-aware SVD layer removal for causal language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layer_surgery.api import compress, evaluate, export_dense, load, report, score, sweep
    from layer_surgery.errors import LayerSurgeryError, UserError
    from layer_surgery.records import (
        Comparison,
        EvaluationReport,
        EvaluationResult,
        LayerPlan,
        LayerScores,
        Perplexity,
        SurgeryPlan,
        SurgeryReport,
    )
    from layer_surgery.records.sweep import SweepPoint, SweepReport

__version__ = "0.2.0"

# Imported on first use: torch and transformers take seconds, and `layer-surgery --help` needs neither.
_HOMES = {
    "layer_surgery.api": ("compress", "evaluate", "export_dense", "load", "report", "score", "sweep"),
    "layer_surgery.errors": ("LayerSurgeryError", "UserError"),
    "layer_surgery.records": (
        "Comparison",
        "EvaluationReport",
        "EvaluationResult",
        "LayerPlan",
        "LayerScores",
        "Perplexity",
        "SurgeryPlan",
        "SurgeryReport",
    ),
    "layer_surgery.records.sweep": ("SweepPoint", "SweepReport"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Comparison",
    "EvaluationReport",
    "EvaluationResult",
    "LayerPlan",
    "LayerScores",
    "LayerSurgeryError",
    "Perplexity",
    "SurgeryPlan",
    "SurgeryReport",
    "SweepPoint",
    "SweepReport",
    "UserError",
    "__version__",
    "compress",
    "evaluate",
    "export_dense",
    "load",
    "report",
    "score",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'layer_surgery' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
