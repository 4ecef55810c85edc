"""Layer Surgery: language models, encoders and embedding models made smaller where their task needs them least."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layer_surgery.api import (
        compress,
        evaluate,
        export_dense,
        foresee,
        foresee_heal,
        foresee_sweep,
        heal,
        load,
        report,
        score,
        sweep,
        verify,
    )
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

__version__ = "0.4.0"

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
    "foresee",
    "foresee_heal",
    "foresee_sweep",
    "heal",
    "load",
    "report",
    "score",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: torch and transformers take seconds, and `layer-surgery --help` needs neither.
    if name in __all__:
        for home in ("api",) if name.islower() else ("errors", "records", "records.sweep"):
            module = importlib.import_module(f"layer_surgery.{home}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'layer_surgery' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
