"""What `test_heal_processes.py` has one process or several do: each of several runs this file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from layer_surgery import api, parallel
from layer_surgery.errors import NumericalError
from layer_surgery.healing.student import Student

#: Two micro-batches of two in each of two processes; of one, four.
OPTIONS: dict[str, Any] = {
    "sequence_length": 12,
    "eval_data": None,
    "continuations": 0,
    "batch_size": 2,
    "tokens": 6 * 8 * 12,
    "learning_rate": 1e-3,
    "step_sequences": 8,
    "loss": ["kl:1", "hidden:0.1"],
}
#: Step whose checkpoint is resumed from.
RESUMED = 3


def healed(folder: Path, name: str, **more: Any) -> Any:
    """Heal `smaller` in a folder, and return the section about it."""
    by = f"by {parallel.group().world}"
    options = OPTIONS | {"teacher_cache": folder / f"cache {by}"} | more
    return api.heal(
        folder / "smaller",
        folder / f"{name} {by}",
        data=[folder / "text.txt"],
        checkpoints=folder / f"checkpoints of {name} {by}",
        **options,
    ).healing


def with_both_models(folder: Path) -> Any:
    """Heal with the original beside the student in each process."""
    losses = ["stones:1", "attention:0.01", "relations:0.1", "hidden:0.1"]
    return healed(folder, "both", both_models=True, teacher_cache=None, loss=losses, tokens=2 * 8 * 12)


def stopped_by_one(folder: Path) -> list[Any]:
    """Return what is said in each process if the loss is not finite in the last one, in the third step."""
    forward, calls = Student.forward, [0]

    def broken(self: Student, *given: Any, **named: Any) -> dict[str, Tensor]:
        calls[0] += 1
        if parallel.group().rank == parallel.group().world - 1 and calls[0] == 5:
            raise NumericalError("on purpose")
        return forward(self, *given, **named)

    Student.forward = broken  # type: ignore[method-assign]
    try:
        record = healed(folder, "stopped")
    finally:
        Student.forward = forward  # type: ignore[method-assign]
    return parallel.gather([record.stopped, record.steps])


def main(folder: Path) -> None:
    """Heal, go on from a checkpoint, and fail in one process."""
    with parallel.joined() as group:
        healed(folder, "whole")
        resume = folder / f"checkpoints of whole by {group.world}" / f"checkpoint-{RESUMED}"
        healed(folder, "resumed", resume=resume)
        said = stopped_by_one(folder)
        with_both_models(folder)
        healed(folder, "probed", tokens=None, minutes=0.02, learning_rate=None, train="lora", lora_rank=2)
        if group.rank == 0:
            (folder / "said.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
