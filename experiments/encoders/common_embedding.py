"""What the experiments with embedding models share: passages of a text, vectors, and the report beside its page."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn.functional import normalize
from train_embedder import neighbours
from train_encoder import read_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import write_report


def parser_of(doc: str | None, *, texts: int, report: Path) -> argparse.ArgumentParser:
    """Return what both comparisons are told: the texts, how many passages of them, seeds, and where the report goes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, action="append", required=True)
    parser.add_argument("--texts", type=int, default=texts, help=f"passages to calibrate on (default: {texts})")
    parser.add_argument("--measured", type=int, default=400, help="passages of each held-out file (default: 400)")
    parser.add_argument("--report", type=Path, default=report)
    return parser


def described(path: Path) -> dict[str, Any]:
    """Return what the report says of a file of text."""
    return {"name": path.name, "sha256": sha256(path)}


def passages(path: Path, count: int, seed: int) -> list[str]:
    """Return so many passages of one to a few sentences from random places of a text file, plain or .xz."""
    text, generator = read_text(path), torch.Generator().manual_seed(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[neighbours([text], generator)[0]] = None
    return list(found)


def unit_vectors(model: SentenceTransformer, texts: list[str]) -> Tensor:
    """Return what sentence-transformers encodes texts as, [n, D] float64 of length 1."""
    vectors = model.encode(texts, convert_to_tensor=True, show_progress_bar=False, batch_size=16)
    return normalize(vectors.double(), dim=1)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_page(path: Path, results: dict[str, Any], page: str) -> None:
    """Write the report and, beside it, its page."""
    write_report(path, results)
    path.with_suffix(".md").write_text(page, encoding="utf-8")
