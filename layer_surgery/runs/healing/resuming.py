"""What a training is of: its checkpoints say it, and it goes on from them only with the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.config import HealingConfig
from layer_surgery.disk.reading import read_json
from layer_surgery.errors import UserError
from layer_surgery.healing.mixture import WeightedLoss
from layer_surgery.healing.training import IDENTITY_FILE
from layer_surgery.healing.windows import HealingData
from layer_surgery.machine import version
from layer_surgery.runs.session import Session

_SHOWN = 60  #: Characters of a value that an error shows.
#: Options that decide the weights and stand nowhere else in the identity.
_OPTIONS = (
    *("train", "lora_rank", "learning_rate", "step_sequences", "tokens", "general", "stages", "local_error"),
    *("teacher_rewrite", "both_models"),
)


def options_identity(
    session: Session, config: HealingConfig, losses: tuple[WeightedLoss, ...], data: HealingData
) -> dict[str, Any]:
    """Return what the options and the data say of a training, by what messages call it."""
    options = {f"--{name.replace('_', '-')}": getattr(config, name) for name in _OPTIONS}
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
        "--loss": [loss.to_dict() for loss in losses],
        "--seed": session.runtime.seed,
        "--dtype": str(session.dtype).removeprefix("torch."),
        "--data (sha256 of its tokens)": data.train.sha256,
        "the release": version("layer-surgery"),
    }


def models_identity(student: Checkpoint, teacher_sha256: str) -> dict[str, Any]:
    """Return what the models say of a training."""
    return {"the result (sha256)": student.sha256(), "the original (sha256)": teacher_sha256}


def check_resumed(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Raise `UserError` that names what differs if a checkpoint is of a training of something else."""
    try:
        was = read_json(checkpoint / IDENTITY_FILE)
        known = {name: was[name] for name in identity}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--resume {checkpoint} does not say what it was trained on ({IDENTITY_FILE} is missing or damaged); begin "
            "anew."
        ) from error
    different = [name for name, value in identity.items() if known[name] != value]
    if different:
        raise UserError(
            f"--resume {checkpoint} is of another training: "
            + "; ".join(f"{name} was {_short(known[name])} and is {_short(identity[name])}" for name in different[:3])
            + "; give the same options as before, or begin anew."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
