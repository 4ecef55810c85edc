"""Tasks through lm-eval: against likelihoods computed by hand, against lm-eval's own command line, and bad input."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from tiny_checkpoints import DEMO, HUB_TASK, environment, model_with_vocabulary, strict_json
from tiny_models import changes, snapshot
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

import layer_surgery
from layer_surgery.config import TaskConfig
from layer_surgery.data import bundled_tasks
from layer_surgery.errors import DataError, UserError
from layer_surgery.evaluation import task_data
from layer_surgery.evaluation.harness import HarnessModel
from layer_surgery.evaluation.task_outcome import TaskOutcome, paired_tasks
from layer_surgery.evaluation.tasks import Tasks
from layer_surgery.progress import no_progress

# The choices of an item are of the same words, so that none is likelier for being short.
ITEMS = [
    {"context": context, "choices": [" ".join(words[k:] + words[:k]) for k in range(3)], "answer": number % 3}
    for number, (context, words) in enumerate(
        (context, words.split())
        for context in ("the quick", "the answer is", "jumps over the", "one two")
        for words in ("brown fox dog", "other thing is", "three four one", "over lazy the")
    )
]
COMMON = """
custom_dataset: !function items.load
test_split: test
fewshot_split: train
metadata: {version: 3}
"""
CHOICE = """
task: own_choice
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: own_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}} {{choices[answer]}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
GENERATE = """
task: own_generate
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GROUP = """
group: own_group
task: [own_choice, own_generate]
"""
LOADER = """
import json
from pathlib import Path
from datasets import Dataset

def load(**_):
    items = json.loads((Path(__file__).parent / "items.json").read_text())
    return {"test": Dataset.from_list(items), "train": Dataset.from_list(items[:3])}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder of task configurations as a user would."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text + COMMON, encoding="utf-8")
    (folder / "group.yaml").write_text(GROUP, encoding="utf-8")
    (folder / "hub.yaml").write_text(HUB_TASK, encoding="utf-8")
    (folder / "broken.yaml").write_text("task: broken\noutput_type: no_such_type\n", encoding="utf-8")
    (folder / "items.py").write_text(LOADER, encoding="utf-8")
    (folder / "items.json").write_text(json.dumps(ITEMS), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return model_with_vocabulary()


def run(names: tuple[str, ...], own: Path, model: PreTrainedModel, **options: Any) -> TaskOutcome:
    tasks = Tasks(TaskConfig(tasks=names, task_path=(own,), **options), bundled_tasks())
    return tasks.run(model, tiny_tokenizer(), no_progress)


def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> float:
    tokenizer = tiny_tokenizer()
    before, whole = (tokenizer(text)["input_ids"] for text in (context, f"{context} {continuation}"))
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logits[k - 1, whole[k]]) for k in range(len(before), len(whole)))


def right_by_hand(model: PreTrainedModel) -> list[float]:
    """Return for every item whether the right answer has the highest likelihood."""
    found = []
    for item in ITEMS:
        scores = [log_likelihood(model, item["context"], choice) for choice in item["choices"]]
        found.append(float(scores.index(max(scores)) == item["answer"]))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracy_is_that_of_likelihoods_computed_by_hand(own: Path, seed: int) -> None:
    model = model_with_vocabulary(seed=seed)
    expected = right_by_hand(model)
    outcome = run(("own_choice",), own, model)
    result = outcome.results["own_choice"]
    assert outcome.items["own_choice"]["acc"].tolist() == expected
    assert result.metrics["acc"].value == pytest.approx(np.mean(expected))
    assert result.metrics["acc"].stderr == pytest.approx(np.std(expected, ddof=1) / np.sqrt(len(ITEMS)))
    assert (result.items, result.num_fewshot, result.version, result.group) == (16, 0, "3", False)


def test_perplexity_by_task_is_that_of_likelihoods_computed_by_hand(own: Path, model: PreTrainedModel) -> None:
    total = words = 0.0
    for item in ITEMS:
        text = f"{item['context']} {item['choices'][item['answer']]}"
        # lm-eval puts the BOS token before a document; the tiny tokenizer's has the id 1.
        ids = [1, *tiny_tokenizer()(text)["input_ids"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total += sum(float(logits[k - 1, ids[k]]) for k in range(1, len(ids)))
        words += len(text.split())
    outcome = run(("own_rolling",), own, model)
    assert outcome.items == {}, "what is no mean over items is not paired"
    metric = outcome.results["own_rolling"].metrics["word_perplexity"]
    assert metric.value == pytest.approx(np.exp(-total / words), rel=1e-5)
    assert not metric.higher_is_better


def test_a_group_brings_its_tasks_and_num_fewshot_and_limit_reach_lm_eval(own: Path, model: PreTrainedModel) -> None:
    outcome = run(("own_group",), own, model, num_fewshot=2, limit=4)
    assert {"own_choice", "own_generate"} <= outcome.results.keys()
    assert all(outcome.results[name].items == 4 for name in ("own_choice", "own_generate"))
    assert outcome.results["own_choice"].num_fewshot == 2
    assert len(outcome.items["own_choice"]["acc"]) == 4


def test_the_same_tasks_can_be_run_on_one_model_after_another(own: Path, model: PreTrainedModel) -> None:
    tasks = Tasks(TaskConfig(tasks=("own_choice", "own_generate"), task_path=(own,), num_fewshot=1), bundled_tasks())
    other = model_with_vocabulary(seed=1)
    first, second, again = (tasks.run(m, tiny_tokenizer(), no_progress) for m in (model, other, model))
    assert first.results == again.results
    assert second.items["own_choice"]["acc"].tolist() != first.items["own_choice"]["acc"].tolist()


def test_the_difference_between_models_is_paired_by_item(own: Path, model: PreTrainedModel) -> None:
    before, after = run(("own_choice",), own, model), run(("own_choice",), own, model_with_vocabulary(seed=2))
    interval = paired_tasks(before, after, seed=0)["own_choice"]["acc"]
    values = [outcome.results["own_choice"].metrics["acc"].value for outcome in (before, after)]
    assert interval.value == pytest.approx(values[1] - values[0]) != 0
    assert interval.low <= interval.value <= interval.high
    assert interval.pairs == 16
    nothing = paired_tasks(before, before, seed=0)["own_choice"]["acc"]
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_the_bundled_tasks_run_and_add_up(model: PreTrainedModel) -> None:
    tasks = Tasks(TaskConfig(tasks=("bundled",), limit=3), bundled_tasks())
    outcome = tasks.run(model, tiny_tokenizer(), no_progress)
    leaves = [name for name in outcome.results if name != "bundled"]
    assert len(leaves) >= 5
    group = outcome.results["bundled"]
    assert group.group and group.num_fewshot is None
    assert group.items == sum(outcome.results[name].items for name in leaves) == 3 * len(leaves)
    assert len(outcome.items["bundled"]["acc"]) == group.items
    mean = np.mean([outcome.results[name].metrics["acc"].value for name in leaves])
    assert group.metrics["acc"].value == pytest.approx(mean)


def test_neither_model_nor_tokenizer_nor_global_generators_change(own: Path, model: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer(pad=None)
    tasks = Tasks(TaskConfig(tasks=("own_choice",), task_path=(own,)), bundled_tasks())

    def seed() -> None:
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(4)

    def draw() -> tuple[float, ...]:
        return random.random(), np.random.random(), float(torch.rand(()))

    seed()
    drawn, before = draw(), snapshot(model)
    seed()
    tasks.run(model, tokenizer, no_progress)
    assert draw() == drawn
    assert changes(before, snapshot(model)) == []
    assert tokenizer.pad_token is None


def test_nothing_goes_to_stdout_and_every_answer_advances_the_progress(
    own: Path,
    model: PreTrainedModel,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # not a git repository, of which lm-eval would have git complain
    seen: list[tuple[str, int]] = []
    ticks: list[None] = []

    @contextlib.contextmanager
    def progress(what: str, total: int) -> Any:
        seen.append((what, total))
        yield lambda: ticks.append(None)

    names = ("own_choice", "own_rolling", "own_generate")
    Tasks(TaskConfig(tasks=names, task_path=(own,)), bundled_tasks()).run(model, tiny_tokenizer(), progress)
    printed = capfd.readouterr()
    assert printed.out == "" and "git" not in printed.err
    assert sorted(total for _, total in seen) == [16, 16, 48]
    assert len(ticks) == 80


@pytest.mark.parametrize(("length", "expected"), [(60, 2), (15, 11), (1, 64)])
def test_the_batch_size_follows_from_the_longest_request(
    model: PreTrainedModel, length: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = HarnessModel(model, tiny_tokenizer(), no_progress)
    monkeypatch.setattr("layer_surgery.evaluation.harness.CPU_LOGITS_BYTES", 170 * 320 * 4 * 3)
    assert harness._detect_batch_size([("", [1] * length, [])]) == expected
    monkeypatch.setattr("layer_surgery.evaluation.harness.CPU_LOGITS_BYTES", 1)
    assert harness._detect_batch_size() == 1


# Bad input


def load(*names: str, own: Path | None = None) -> Tasks:
    return Tasks(TaskConfig(tasks=names, task_path=(own,) if own else ()), bundled_tasks())


def test_a_task_whose_data_are_on_the_hub_is_refused_offline(own: Path) -> None:
    with pytest.raises(DataError, match=r"the data of task 'from_hub' are neither .* cache nor .* from the hub"):
        load("from_hub", own=own)


def test_an_unreachable_hub_is_asked_once_and_then_only_the_cache(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []

    def no_answer() -> bool:
        asked.append(None)
        return False

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(task_data, "_hub_answers", no_answer)
    with pytest.raises(DataError, match="from_hub"):
        load("from_hub", own=own)
    assert len(asked) == 1
    assert load("own_choice", "bundled", own=own)
    assert len(asked) == 1, "what is here needs no network"
    assert huggingface_hub.constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is False


def test_a_task_that_is_named_twice_is_refused() -> None:
    with pytest.raises(DataError, match=r"more than once \(Duplicate task 'bundled_cloze'"):
        load("bundled", "bundled_cloze")
    assert load("bundled_cloze", "bundled_cloze")


def test_a_task_that_runs_code_is_refused(own: Path) -> None:
    choice = CHOICE.replace("task: own_choice", "task: own_code\nunsafe_code: true")
    (own / "code.yaml").write_text(choice + COMMON)
    with pytest.raises(DataError, match="task 'own_code' runs code that the model writes"):
        load("own_code", own=own)


@pytest.mark.slow  # the index of lm-eval's own tasks takes seconds
def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"unknown task 'hellaswagg'\. Did you mean 'hellaswag'"):
        load("bundled", "hellaswagg")


@pytest.mark.slow
def test_a_damaged_task_is_one_sentence(own: Path) -> None:
    with pytest.raises(DataError, match=r"task 'broken' cannot be loaded \(\w+: .*no_such_type"):
        load("broken", own=own)


def test_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"tasks": ("a",), "limit": 0}, "--limit is 0; allowed: 1 or more"),
        ({"tasks": ("a",), "num_fewshot": -1}, "--num-fewshot is -1"),
        ({"tasks": ("a",), "task_path": (tmp_path / "none",)}, "is not a directory"),
        ({"tasks": ("none.yaml",)}, "none.yaml, which is not there"),
        ({"limit": 3}, "--limit says how tasks are run, but no task is named"),
        ({"num_fewshot": 0}, "--num-fewshot says how"),
        ({"task_path": (tmp_path,)}, "--task-path says how"),
    ):
        with pytest.raises(UserError, match=message):
            TaskConfig(**options)


# The bundled tasks on the demo checkpoint, and lm-eval's own command line


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, own: Path) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("demo") / "output"
    tasks = {"tasks": ["bundled", "own_rolling", "own_generate"], "task_path": own}
    layer_surgery.compress(DEMO, output, layers=[4, 7], method="svd", samples=8, eval_data=None, **tasks)
    return output, strict_json((output / "surgery.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_results_are_those_of_lm_evals_own_command_line(
    demo: tuple[Path, dict[str, Any]], own: Path, tmp_path: Path
) -> None:
    output, report = demo
    folder = tmp_path / "tasks"  # the command line takes one folder
    folder.mkdir()
    for path in (*bundled_tasks().glob("*.*"), *own.glob("*.*")):
        name = f"own_{path.name}" if path.name == "items.py" and path.parent == own else path.name
        text = path.read_text(encoding="utf-8")
        text = text.replace("items.load", "own_items.load") if path.parent == own else text
        (folder / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "64"]
    command += ["--model_args", f"pretrained={output},dtype=float32,trust_remote_code=True"]
    command += ["--tasks", "bundled,own_rolling,own_generate", "--include_path", str(folder)]
    command += ["--output_path", str(tmp_path / "results")]
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        command, env=environment(home) | {"PYTHONPATH": ""}, cwd=home, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "results").rglob("results_*.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]
    ours = report["after"]["tasks"]
    assert ours.keys() == theirs.keys()
    compared = 0
    for name, task in ours.items():
        for metric, found in task["metrics"].items():
            assert found["value"] == theirs[name][f"{metric},none"], (name, metric)
            stderr = theirs[name][f"{metric}_stderr,none"]
            assert found["stderr"] == (stderr if stderr != "N/A" else None), (name, metric)
            compared += 1
    assert compared == len(ours) == 9


@pytest.mark.slow
def test_the_bundled_tasks_say_something_about_the_demo_model(demo: tuple[Path, dict[str, Any]]) -> None:
    """Between chance and 1, by three standard errors."""
    chance = {"agreement": 0.5, "pronouns": 0.5, "verb_forms": 0.5, "cloze": 0.25, "copying": 0.25, "partners": 0.25}
    for name, guessing in chance.items():
        task = demo[1]["before"]["tasks"][f"bundled_{name}"]
        accuracy = task["metrics"]["acc"]
        assert task["items"] >= 100
        assert guessing + 3 * accuracy["stderr"] < accuracy["value"] < 1 - 2 * accuracy["stderr"], name


def test_bundled_items_are_what_their_script_writes() -> None:
    script = bundled_tasks().parent / "build_tasks.py"
    assert subprocess.run([sys.executable, script, "--check"], env=dict(os.environ), check=False).returncode == 0


def test_bundled_items_are_well_formed_and_all_different() -> None:
    for file in bundled_tasks().glob("*.jsonl"):
        items = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert len(items) >= 100
        assert len({json.dumps([i["context"], sorted(i["choices"])]) for i in items}) == len(items)
        for item in items:
            assert len(set(item["choices"])) == len(item["choices"]) in (2, 4)
            assert 0 <= item["answer"] < len(item["choices"])
        positions = {item["answer"] for item in items}
        assert positions == set(range(len(items[0]["choices"])))  # the right one stands everywhere
