"""What the experiments share: results are JSON with provenance, written under reports/."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from layer_surgery.machine import provenance
from layer_surgery.records.provenance import portable, portable_command

ROOT = Path(__file__).resolve().parents[1]
DEMO_CHECKPOINT = ROOT / "experiments" / "demo" / "checkpoint"


def write_report(path: Path, results: dict[str, Any], device: str = "cpu") -> None:
    """Write results with versions, hardware and the command that made them, its paths relative to the repository."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = portable_command(["python", *sys.argv], ROOT)
    words = portable({name: value for name, value in results.items() if isinstance(value, str)}, ROOT)
    record = {"provenance": provenance(torch.device(device)) | {"command": command}, **results, **words}
    text = json.dumps(record, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)
