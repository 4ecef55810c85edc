"""What is fetched of a hub repository: what is needed, and nothing else. No network: a folder stands for the hub."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from layer_surgery.checkpoint import hub
from layer_surgery.errors import CheckpointError

FILES = (
    *(
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tokenizer.json",
        "README.md",
        "consolidated.safetensors",
    ),
    *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin"),
    *("onnx/model.onnx", "onnx/config.json", "original/model.safetensors"),
)
NEEDED = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
MODULES = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that a repository of `FILES` is fetched to, file by file, as the hub's patterns say."""
    repository, folder = tmp_path / "repository", tmp_path / "snapshot"
    for name in FILES:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(name)

    def download(model: str, *, revision: Any, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (model, revision) == ("owner/model", "main")
        for path in filter(Path.is_file, repository.rglob("*")):
            name = path.relative_to(repository).as_posix()
            allowed, ignored = (any(fnmatch(name, each) for each in ways) for ways in (allow_patterns, ignore_patterns))
            if allowed and not ignored:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, folder / name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return folder


def found(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_of_a_language_model_the_files_beside_its_configuration_are_fetched(snapshot: Path) -> None:
    assert hub.local_directory("owner/model", "main") == snapshot
    assert found(snapshot) == NEEDED


def test_of_an_embedding_model_the_folders_that_it_names_are_fetched_too(snapshot: Path) -> None:
    modules = [{"type": "x", "path": path} for path in ("", "1_Pooling", "2_Dense")]
    (snapshot.parent / "repository" / "modules.json").write_text(json.dumps(modules))
    assert hub.local_directory("owner/model", "main") == snapshot
    assert found(snapshot) == NEEDED | MODULES | {"modules.json"}


def test_a_folder_outside_of_the_repository_is_not_asked_for(snapshot: Path) -> None:
    (snapshot.parent / "repository" / "modules.json").write_text(json.dumps([{"type": "x", "path": "../other"}]))
    with pytest.raises(CheckpointError, match=r"modules\.json is damaged"):
        hub.local_directory("owner/model", "main")
