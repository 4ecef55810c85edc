"""The bundled queries and passages: whole, made by their script, and not to be found by their words alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layer_surgery.data import bundled
from layer_surgery.data.bundled import bundled_directory, bundled_retrieval, load_bundled
from layer_surgery.data.documents import Text
from layer_surgery.data.retrieval import bundled_retrieval_sets
from layer_surgery.errors import DataError


def test_the_files_are_what_their_script_writes() -> None:
    script = bundled_directory() / "build_retrieval.py"
    assert subprocess.run([sys.executable, script, "--check"], env=dict(os.environ), check=False).returncode == 0


def test_the_sets_are_well_formed() -> None:
    passage, text = bundled_retrieval_sets()
    assert (passage.name, text.name) == ("passage", "text")
    assert passage.queries == text.queries and passage.documents == text.documents
    assert len(passage.queries) >= 100 and len(passage.documents) >= 400
    assert len(set(passage.documents)) == len(passage.documents)
    assert len(set(passage.groups)) >= 15
    for one, several, query in zip(passage.relevant, text.relevant, passage.queries, strict=True):
        assert len(one) == 1 and one <= several
        assert all(query not in passage.documents[place] for place in several)
        assert max(several) < len(passage.documents)
    together = {place: group for several, group in zip(text.relevant, text.groups, strict=True) for place in several}
    assert len(set(together.values())) == len(set(text.groups))


def test_queries_are_of_the_evaluation_part_only() -> None:
    parts = {}
    for part in ("calibration", "evaluation"):
        documents = load_bundled(part).documents
        texts = [each.text for each in documents if isinstance(each, Text)]
        parts[part] = " ".join(" ".join(texts).split())
    for query in bundled_retrieval_sets()[0].queries:
        assert query in parts["evaluation"] and query not in parts["calibration"]


def test_damaged_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "calibration_data"
    shutil.copytree(bundled_directory(), copy)
    monkeypatch.setattr(bundled, "bundled_directory", lambda: copy)
    assert bundled_retrieval() == copy / "retrieval"
    with (copy / "retrieval" / "queries.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"the bundled retrieval sets are damaged: .*queries.jsonl is not as"):
        bundled_retrieval_sets()
    (copy / "retrieval" / "queries.jsonl").unlink()
    with pytest.raises(DataError, match=r"queries.jsonl is missing"):
        bundled_retrieval_sets()
