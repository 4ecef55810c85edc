"""Tasks of embedding models through mteb: its own scores of the same directory, data in the cache, and bad input."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_checkpoints import CommandLine, assert_refused, strict_json
from tiny_embedders import saved_embedder
from tiny_encoders import encoder_tokenizer
from tiny_models import settings, streamed

from layer_surgery.config import TaskConfig
from layer_surgery.errors import DataError
from layer_surgery.evaluation.text_encoder import TextEncoder
from layer_surgery.progress import no_progress

mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install mteb")

from layer_surgery.evaluation.embedding_tasks import EmbeddingTasks  # noqa: E402  # it imports mteb

WORDS = ["fox", "dog", "lazy", "quick", "brown", "one", "two", "three", "answer", "jumps", "over", "the", "is", "and"]
#: Of each kind of task whose items are known, one without, and one with several subsets.
CLASSES = """
import random
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

WORDS = {words!r}
GENERATOR = random.Random(0)


def text(length):
    return " ".join(GENERATOR.choice(WORDS) for _ in range(length))


def about(name, type, main_score, langs=("eng-Latn",)):
    return TaskMetadata(
        name=name, type=type, main_score=main_score, eval_langs=list(langs) if isinstance(langs, tuple) else langs,
        description="made in a test", dataset={{"path": "nobody/nothing", "revision": "7"}}, category="t2t",
        eval_splits=["test"], modalities=["text"],
    )


def pairs(count):
    firsts = [text(5) for _ in range(count)]
    seconds = [first if GENERATOR.random() < 0.3 else f"{{first[:8]}} {{text(3)}}" for first in firsts]
    scores = [5 * GENERATOR.random() for _ in firsts]
    return Dataset.from_dict({{"sentence1": firsts, "sentence2": seconds, "score": scores}})


class Alike(AbsTaskSTS):
    metadata = about("OwnAlike", "STS", "cosine_spearman")

    def load_data(self, **_):
        GENERATOR.seed(self.metadata.name)
        self.dataset, self.data_loaded = DatasetDict(test=pairs(40)), True


class AlikeInTwo(AbsTaskSTS):
    metadata = about("OwnAlikeInTwo", "STS", "cosine_spearman", {{"first": ["eng-Latn"], "second": ["fra-Latn"]}})

    def load_data(self, **_):
        GENERATOR.seed(self.metadata.name)
        self.dataset = {{name: DatasetDict(test=pairs(20)) for name in self.hf_subsets}}
        self.data_loaded = True


class Found(AbsTaskRetrieval):
    metadata = about("OwnFound", "Retrieval", "ndcg_at_10")

    def load_data(self, **_):
        GENERATOR.seed(self.metadata.name)
        documents = [text(6) for _ in range(60)]
        self.corpus = {{"test": {{f"d{{k}}": {{"title": "", "text": each}} for k, each in enumerate(documents)}}}}
        self.queries = {{"test": {{f"q{{k}}": " ".join(documents[k].split()[1:4]) for k in range(30)}}}}
        self.relevant_docs = {{"test": {{f"q{{k}}": {{f"d{{k}}": 1}} for k in range(30)}}}}
        self.data_loaded = True


class Kinds(AbsTaskClassification):
    metadata = about("OwnKinds", "Classification", "accuracy")

    def load_data(self, **_):
        GENERATOR.seed(self.metadata.name)
        rows = [{{"text": text(4), "label": k % 2}} for k in range(60)]
        self.dataset = DatasetDict(train=Dataset.from_list(rows[:40]), test=Dataset.from_list(rows[40:]))
        self.data_loaded = True
"""
NAMES = ("OwnAlike", "OwnAlikeInTwo", "OwnFound", "OwnKinds")
#: One that a task type has, those of queries and documents, and one for all other texts.
PROMPTS = {
    "prompts": {"STS": "the quick ", "query": "one ", "document": "two three ", "any": "a lazy "},
    "default_prompt_name": "any",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with classes of tasks, and a file that must not be run."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "classes.py").write_text(CLASSES.format(words=WORDS), encoding="utf-8")
    (folder / "unnamed.py").write_text("raise RuntimeError('nobody has named a task of this file')", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_embedder(tmp_path_factory.mktemp("models") / "model", settings=PROMPTS)


def encoder(model: Path, scratch: Path) -> TextEncoder:
    return TextEncoder(streamed(model), encoder_tokenizer(), settings(scratch))


def tasks(names: Sequence[str], *folders: Path) -> EmbeddingTasks:
    return EmbeddingTasks(TaskConfig(tasks=tuple(names), task_path=folders))


def test_scores_are_those_of_mteb_on_the_directory(own: Path, model: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    loaded = tasks(NAMES, own)
    found = loaded.run(encoder(model, tmp_path), no_progress)
    theirs = SentenceTransformer(str(model), device="cpu")
    for name, task in loaded._tasks.items():
        (expected,) = mteb.evaluate(theirs, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
        result = found.results[name]
        assert next(iter(result.metrics.values())).value == pytest.approx(expected.get_score(), abs=1e-5), name
        assert 0.01 < expected.get_score() < 0.99 or "Alike" in name
        assert result.version == "7"
    assert {name: result.items for name, result in found.results.items()} == {
        "OwnAlike": 40, "OwnAlikeInTwo": 40, "OwnFound": 30, "OwnKinds": 20,
    }  # fmt: skip
    of_subsets = found.results["OwnAlikeInTwo"].metrics
    assert list(of_subsets) == ["cosine_spearman", "cosine_spearman,first", "cosine_spearman,second"]
    values = [metric.value for metric in of_subsets.values()]
    assert values[0] == pytest.approx((values[1] + values[2]) / 2) and values[1] != values[2]
    one = tasks(["OwnAlikeInTwo:second"], own).run(encoder(model, tmp_path), no_progress)
    assert one.results["OwnAlikeInTwo:second"].items == 20
    assert found.items.keys() == {"OwnFound"} and found.correlated.keys() == {"OwnAlike"}
    again = loaded.run(encoder(model, tmp_path), no_progress)
    assert again.results == found.results and np.array_equal(
        again.items["OwnFound"]["ndcg_at_10"], found.items["OwnFound"]["ndcg_at_10"]
    )


def test_before_and_after_stand_in_one_table_with_intervals(
    run: CommandLine, own: Path, model: Path, tmp_path: Path
) -> None:
    output, given = tmp_path / "output", ("--tasks", ",".join(NAMES[:1] + NAMES[2:]), "--task-path", own, "--no-eval")
    cut = ("--target-layers", 3, "--method", "remove", "--sequence-length", 32, "--samples", 8)
    outcome = run("compress", model, *cut, *given, "--output", output)
    assert outcome.code == 0, outcome.err
    report = strict_json((output / "surgery.json").read_text(encoding="utf-8"))
    before, after, changes = report["before"]["tasks"], report["after"]["tasks"], report["comparison"]["tasks"]
    assert before.keys() == after.keys() == {"OwnAlike", "OwnFound", "OwnKinds"}
    for name, metric in (("OwnAlike", "cosine_spearman"), ("OwnFound", "ndcg_at_10")):
        change = changes[name][metric]
        values = [result[name]["metrics"][metric]["value"] for result in (before, after)]
        assert change["value"] == pytest.approx(values[1] - values[0], abs=2e-5)
        assert change["low"] <= change["value"] <= change["high"] and change["pairs"] == before[name]["items"]
        assert name in outcome.out and "[" in outcome.out.partition(name)[2].splitlines()[0]
    of_kinds = [result["OwnKinds"]["metrics"]["accuracy"]["value"] for result in (before, after)]
    row = outcome.out.partition("OwnKinds")[2].splitlines()[0]
    assert "OwnKinds" not in changes and f"{of_kinds[1] - of_kinds[0]:+.4f}" in row and "[" not in row
    assert report["provenance"]["packages"]["mteb"]
    measured = run("evaluate", output, "--baseline", model, *given, "--json")
    assert measured.code == 0, measured.err
    again = json.loads(measured.out)
    assert again["model"]["tasks"] == after and again["comparison"]["tasks"] == changes


def test_data_in_the_local_cache_need_no_network(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"the data of task 'STSBenchmark' are neither .* cache nor .* from the hub"):
        tasks(["STSBenchmark"])
    random.seed(0)
    texts = [" ".join(random.choices(WORDS, k=4)) for _ in range(30)]
    rows = [
        {"sentence1": a, "sentence2": b, "score": float(k % 6)}
        for k, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]
    in_cache(tmp_path, mteb.get_task("STSBenchmark").metadata.dataset, rows)
    found = tasks(["STSBenchmark"]).run(encoder(model, tmp_path), no_progress)
    assert found.results["STSBenchmark"].items == 15
    assert len(found.correlated["STSBenchmark"]["cosine_spearman"].values) == 15


def in_cache(cache: Path, dataset: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Write the test split of a dataset as `datasets` keeps what it has had from the hub."""
    owner, name = dataset["path"].split("/")
    folder = cache / f"{owner}___{name}" / "default" / "0.0.0" / dataset["revision"]
    folder.mkdir(parents=True)
    data = datasets.Dataset.from_list(rows)
    writer = datasets.arrow_writer.ArrowWriter(path=str(folder / f"{name}-test.arrow"), features=data.features)
    for row in rows:
        writer.write(row)
    examples, size = writer.finalize()
    split = datasets.SplitInfo(name="test", num_bytes=size, num_examples=examples, dataset_name=name)
    info = datasets.DatasetInfo(
        features=data.features,
        builder_name="parquet",
        dataset_name=name,
        config_name="default",
        version="0.0.0",
        splits=datasets.SplitDict({"test": split}, dataset_name=name),
    )
    info.write_to_directory(str(folder))


def test_nothing_is_printed_and_global_generators_stay(
    own: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def seed() -> None:
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(4)

    seed()
    drawn = draw()
    seed()
    tasks(["OwnAlike", "OwnKinds"], own).run(encoder(model, tmp_path), no_progress)
    assert draw() == drawn
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_run_is_refused_before_any_work(
    run: CommandLine, own: Path, model: Path, tmp_path: Path
) -> None:
    def refused(names: str, *expected: str, more: Sequence[Any] = ()) -> None:
        assert_refused(run("evaluate", model, "--no-eval", "--tasks", names, *more), *expected)

    refused("STSBenchmrk", "unknown task 'STSBenchmrk'. Did you mean 'STSBenchmark'?")
    refused("arc_easy", "unknown task 'arc_easy'", "Embedding models have tasks of mteb")
    refused("STS22:xy", "task 'STS22' has no subset 'xy'", "It has: ", "de-en")
    refused("CIFAR10", "task 'CIFAR10' needs image, but the model reads text only")
    refused("STSBenchmark", "--limit need", more=("--limit", 3))
    file = tmp_path / "task.yaml"
    file.write_text("task: own", encoding="utf-8")
    refused(str(file), "embedding models have tasks of mteb; give their names")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "own.py").write_text('NAME = "OwnBroken"\nimport no_such_module_of_mine', encoding="utf-8")
    refused(
        "OwnBroken", "which names task 'OwnBroken', cannot be run (ModuleNotFoundError", more=("--task-path", broken)
    )
