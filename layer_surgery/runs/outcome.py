"""What a run that makes a result says of it: the fields of its report that `compress` and `heal` have in common."""

from typing import Any

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.devices import peak_device_memory_bytes, peak_memory_bytes
from layer_surgery.runs.evaluator import Evaluator
from layer_surgery.runs.healing import unhealed_record
from layer_surgery.runs.session import Session


def evaluate_result(session: Session, evaluator: Evaluator, checkpoint: Checkpoint, *, healed: bool) -> dict[str, Any]:
    """Measure a result and compare it with the original, and with what it was before healing; return the fields."""
    with session.stage("evaluate_after"):
        evaluator.measure("after", checkpoint)
        found = {
            "comparison": evaluator.compare(),
            "unhealed": unhealed_record(evaluator) if healed else None,
            # The measurement of speed begins to count anew.
            "peak_device_memory_bytes": peak_device_memory_bytes(session.device),
        }
        evaluator.measure_speed()
    return found


def measured(session: Session, evaluator: Evaluator) -> dict[str, Any]:
    """Return, at the end of a run, the fields that say what was measured of each model, and what the run took."""
    return {
        "before": evaluator.result("before"),
        "after": evaluator.result("after"),
        "continuations": evaluator.side_by_side(),
        "failures": evaluator.failures,
        "timings": session.clock.rounded,
        "peak_memory_bytes": peak_memory_bytes(),
    }
