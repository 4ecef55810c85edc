"""One small model and its result, which the tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import saved_model, text_file

import layer_surgery
from layer_surgery import SurgeryReport


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"), layers=5)


@pytest.fixture(scope="package")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = text_file(tmp_path_factory.mktemp("text") / "text.txt")
    lengths = {"samples": 16, "sequence_length": 16, "continuations": 1}
    return {"target_layers": 3, "keep": 0.3, "calibration": text, "eval_data": [text], **lengths}


@pytest.fixture(scope="package")
def result(
    model: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, SurgeryReport]:
    """The directory and the report of a result with two low-rank layers."""
    output = tmp_path_factory.mktemp("result") / "smaller"
    return output, layer_surgery.compress(model, output, **options)


@pytest.fixture
def copy(result: tuple[Path, SurgeryReport], tmp_path: Path) -> Path:
    """A folder with all that `report` needs of the result."""
    directory = tmp_path / "smaller"
    directory.mkdir()
    for name in ("surgery.json", "config.json", "report.html", "README.md"):
        (directory / name).write_bytes((result[0] / name).read_bytes())
    return directory
