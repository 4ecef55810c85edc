"""Where a model lies on this machine: its own directory, or a snapshot of a hub repository with what is needed."""

from __future__ import annotations

import os
from pathlib import Path

from layer_surgery.checkpoint.embedder import MODULES_FILE, module_folders
from layer_surgery.errors import CheckpointError

#: Files of a hub repository that are needed; nothing else is downloaded.
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt", "*.py", "LICENSE*", "README.md"]
#: Second copies of the weights in other formats, and everything in folders.
HUB_IGNORED = ["consolidated*", "*/*"]


def local_directory(model: str, revision: str | None) -> Path:
    """Return the directory of a local model, or of a hub model's snapshot (fetched if it is not in the cache).

    Raises `CheckpointError` if there is neither.
    """
    directory = Path(os.path.expanduser(model))
    if os.path.isdir(directory):  # False where Path raises: for names that are too long
        return directory
    if os.path.exists(directory):
        raise CheckpointError(f"MODEL '{model}' is a file; give the directory that holds config.json and the weights.")
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or not model.strip()
    if looks_like_path:
        raise CheckpointError(f"no such model: there is no directory '{model}'.")
    from huggingface_hub.errors import HFValidationError

    try:
        return _snapshot(model, revision)
    except (OSError, HFValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"no such model: '{model}' is neither a local directory nor a model that could be had from the hub "
            f"({type(error).__name__}: {reason})."
        ) from error


def _snapshot(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    root = Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED))
    if (root / MODULES_FILE).is_file():  # the modules of an embedding model are in folders, which it names
        wanted = [f"{folder}/{pattern}" for folder in module_folders(root) for pattern in HUB_PATTERNS]
        snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*/*"])
    return root
