"""The generator of BLiMP tasks: what it writes runs, counts as by hand, and bad folders are refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_checkpoints import REPOSITORY, model_with_vocabulary
from tiny_tokenizer import tiny_tokenizer

from layer_surgery.config import TaskConfig
from layer_surgery.data import bundled_tasks
from layer_surgery.evaluation.tasks import Tasks
from layer_surgery.progress import no_progress

PAIRS = {
    "agreement": [("the dog jumps over", "the dog jump over"), ("the fox is lazy", "the fox are lazy")] * 3,
    "order": [("the quick fox", "the fox quick"), ("one two three", "one three two"), ("the answer", "answer the")],
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tasks", REPOSITORY / "experiments" / "blimp" / "make_tasks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a 'folder' with: signs"
    folder.mkdir()
    for name, pairs in PAIRS.items():
        lines = [json.dumps({"sentence_good": good, "sentence_bad": bad, "field": "x"}) for good, bad in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return folder


def test_accuracy_is_how_often_the_good_sentence_is_likelier(script: ModuleType, folder: Path, tmp_path: Path) -> None:
    assert script.main([str(folder), str(tmp_path / "tasks")]) == 0
    model = model_with_vocabulary(seed=3)

    def score(sentence: str) -> float:
        ids = [1, *tiny_tokenizer()(sentence)["input_ids"]]  # lm-eval begins with BOS
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logits[k - 1, ids[k]]) for k in range(1, len(ids)))

    tasks = Tasks(TaskConfig(tasks=("blimp_local",), task_path=(tmp_path / "tasks",)), bundled_tasks())
    outcome = tasks.run(model, tiny_tokenizer(), no_progress)
    right = 0
    for name, pairs in PAIRS.items():
        expected = [float(score(good) > score(bad)) for good, bad in pairs]
        assert outcome.items[f"blimp_local_{name}"]["acc"].tolist() == expected
        right += int(sum(expected))
    group = outcome.results["blimp_local"]
    assert group.items == 9
    assert group.metrics["acc"].value == pytest.approx(right / 9)
    assert 0 < right < 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no .jsonl files"),
        ("", "is empty"),
        ('{"sentence_good": "a"}', "line 1 is not a JSON object with sentence_good and sentence_bad"),
        ('{"sentence_good": "a", "sentence_bad": "b"}\nnot JSON', "line 2 is not"),
        ("[1]", "line 1 is not"),
    ],
)
def test_a_folder_without_pairs_is_refused_before_anything_is_written(
    script: ModuleType, tmp_path: Path, content: str | None, message: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if content is not None:
        (folder / "x.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        script.main([str(folder), str(tmp_path / "tasks")])
    assert not (tmp_path / "tasks").exists()
