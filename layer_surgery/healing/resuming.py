"""Checkpoints of a training that is to be gone on with, looked at before any work; one sentence for whatever is wrong.

Trainer itself reads what is not ours, with torch's restricted loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_callback import TrainerState

from layer_surgery.disk.reading import check_regular, read_json, why
from layer_surgery.errors import UserError
from layer_surgery.healing.trainee import WEIGHTS_FILE

STATE_FILE = "trainer_state.json"
#: Files without which a training would go on in another way than it was begun, and nothing would be said.
_FILES = (STATE_FILE, WEIGHTS_FILE, "optimizer.pt", "scheduler.pt")


def check_training_checkpoint(directory: Path) -> None:
    """Raise `UserError` unless a directory is a checkpoint of a training that can be gone on with."""
    with reading_checkpoint(directory):
        for name in _FILES:
            try:
                check_regular(directory / name)
            except OSError as error:
                raise UserError(
                    f"--resume {directory} is no checkpoint of a training ({name}: {why(error)}); give --checkpoints' "
                    "DIR/checkpoint-N."
                ) from error
        read_json(directory / STATE_FILE)  # not nested so deeply that Trainer overflows
        state = TrainerState.load_from_json(str(directory / STATE_FILE))
        if not all(type(number) is int and number >= 0 for number in (state.global_step, state.max_steps)):
            raise ValueError(f"{STATE_FILE} has steps that are no numbers")


def check_same_length(directory: Path, steps: int) -> None:
    """Raise `UserError` if a checkpoint is of a training with another number of steps."""
    with reading_checkpoint(directory):
        state = TrainerState.load_from_json(str(directory / STATE_FILE))
    if state.max_steps != steps:
        raise UserError(
            f"--resume {directory} is of a training of {state.max_steps} steps, and this one has {steps}; give the "
            "same --tokens, --step-sequences and --sequence-length as before."
        )


@contextmanager
def reading_checkpoint(directory: Path) -> Iterator[None]:
    """Say of whatever goes wrong in the block that a checkpoint of a training is damaged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # pickles and JSON that are damaged make libraries raise anything
        reason = why(error) if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise UserError(
            f"--resume {directory} is damaged, or of another training ({type(error).__name__}: {reason}); give an "
            "earlier checkpoint, or leave --resume out."
        ) from error
