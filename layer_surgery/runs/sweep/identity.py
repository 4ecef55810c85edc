"""Identity of a sweep: all that decides its results, by content, so that files may have other names or places."""

import hashlib
from pathlib import Path
from typing import Any

from layer_surgery.config import SweepConfig, TaskConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import OutputError
from layer_surgery.machine import code_sha256, version
from layer_surgery.records.sweep import EVALUATION_DATA
from layer_surgery.runs.session import Session


def sweep_identity(
    session: Session, config: SweepConfig, sha256: str, tokens: PackedTokens, texts: list[PackedTokens]
) -> dict[str, Any]:
    """Return hashes and options, by what messages call them.

    Not in it: what changes speed or memory only, as the batch size, and what names the points.
    """
    speed = {
        "batch_sizes": list(config.speed_batch_sizes),
        "prompt_lengths": list(config.speed_lengths),
        "new_tokens": config.speed_new_tokens,
        "repeats": config.speed_repeats,
    }
    return {
        "the model (sha256)": sha256,
        "--seed": config.seed,
        "--samples": config.samples,
        "--sequence-length": config.sequence_length,
        "--window-overlap": config.window_overlap,
        "--eval-windows": config.eval_windows,
        "--calibration (sha256 of its tokens)": tokens.sha256,
        EVALUATION_DATA: [text.sha256 for text in texts],
        "--remove": config.remove,
        "--refit-scope": config.refit_scope,
        "--refit-general": config.refit_general,
        "--components": None if config.components is None else sorted(config.components),
        "--multiple": config.multiple,
        "--uniform": config.uniform,
        "--distance": config.distance,
        "--tasks": _tasks(config),
        "--speed": speed if config.speed else None,
        "--device": session.device.type,
        "--dtype": str(session.dtype).removeprefix("torch."),
        "--decomposition": config.decomposition,
        "the release of layer-surgery": version("layer-surgery"),
        "the code of layer-surgery (sha256)": code_sha256(),
    }


def check_same(directory: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `OutputError` that names what differs between the sweep in a directory and the one that is asked for."""
    different = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    if different:
        raise OutputError(
            f"--output {directory} holds a sweep with other settings: "
            + "; ".join(_difference(name, was, now) for name in different)
            + "; give the same settings to go on with it, another --output, or --overwrite to start anew."
        )


def _difference(name: str, was: dict[str, Any], now: dict[str, Any]) -> str:
    """Say how a setting differs; sweeps of older releases have not written down all of them."""
    if name not in was:
        return f"{name} is {_short(now[name])}, and what it was is not written down (an older release made the sweep)"
    if name not in now:
        return f"{name} was {_short(was[name])}, which this release does not know"
    return f"{name} was {_short(was[name])} and is {_short(now[name])}"


def _tasks(config: TaskConfig) -> dict[str, Any] | None:
    """Return what tasks are run, with hashes in the place of files and folders."""
    if not config.tasks:
        return None
    names = [_sha256([Path(name)]) if name.endswith((".yaml", ".yml")) else name for name in config.tasks]
    files = [sorted(path for path in folder.rglob("*") if path.is_file()) for folder in config.task_path]
    options = {"num_fewshot": config.num_fewshot, "limit": config.limit}
    return {"names": names, "files": [_sha256(found) for found in files], **options}


def _sha256(files: list[Path]) -> str:
    """Return one hash of what files hold, with their last names."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _short(value: Any) -> str:
    """Return a value for a message; of a hash the beginning."""
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    text = "none" if value is None else str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
