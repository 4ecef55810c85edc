"""Reads the items of a bundled task for lm-eval."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(file: str, **_metadata: Any) -> dict[str, Dataset]:
    """Return the items of a JSONL file beside this one as the test split."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
