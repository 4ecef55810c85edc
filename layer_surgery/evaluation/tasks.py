"""Tasks by lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), through its Python interface."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator, simple_evaluate
from lm_eval.tasks import TaskManager
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layer_surgery.config import TaskConfig
from layer_surgery.devices import torchs_products
from layer_surgery.errors import DataError
from layer_surgery.evaluation.harness import HarnessModel
from layer_surgery.evaluation.task_data import cannot_be_loaded, changed, from_cache_or_hub, generators_kept
from layer_surgery.evaluation.task_names import unknown_task
from layer_surgery.evaluation.task_outcome import TaskOutcome
from layer_surgery.progress import Progress
from layer_surgery.records import TaskMetric, TaskResult


class Tasks:
    """Tasks with their data loaded, so that nothing about them can go wrong after the first model has been run."""

    def __init__(self, config: TaskConfig, bundled: Path) -> None:
        """Load the tasks; `bundled` is the directory of those that come with the project.

        Raises `DataError` for an unknown task, a damaged one, and one whose data are not here and cannot be had.
        """
        self._config = config
        own = [bundled, *config.task_path]
        # lm-eval's own tasks are 15,000 files, whose index takes seconds; often nobody asks for them.
        for with_defaults in (False, True):
            self._manager = TaskManager(include_path=own, include_defaults=with_defaults)
            named = [name for name in config.tasks if not name.endswith((".yaml", ".yml"))]
            unknown = [name for name in named if name not in self._manager.task_index]
            if unknown and not with_defaults:
                continue
            if unknown:
                raise unknown_task(unknown[0], self._manager.all_tasks)
            try:
                self._specs = [spec for name in dict.fromkeys(config.tasks) for spec in self._load(name)]
                break
            except DataError as error:  # perhaps a group of the user's has one of lm-eval's own tasks
                if with_defaults or isinstance(error.__cause__, ConnectionError):
                    raise
        self._check()

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> TaskOutcome:
        """Run all tasks on a model, as lm-eval's command line would with the same options."""
        # lm-eval prints on stdout, seeds the global generators, and runs git where the user stands, which outside of a
        # repository writes an error on stderr.
        no_git = changed(evaluator, "get_git_commit_hash", lambda: None)
        with (
            contextlib.redirect_stdout(io.StringIO()),
            no_git,
            generators_kept(),
            torch.no_grad(),
            torchs_products(),
        ):
            found: Any = simple_evaluate(
                model=HarnessModel(model, tokenizer, progress),
                tasks=self._specs,
                task_manager=self._manager,
                num_fewshot=self._config.num_fewshot,
                limit=self._config.limit,
            )
        names = [*found["results"], *(name for name in found.get("groups", {}) if name not in found["results"])]
        results = {name: _result(found, name) for name in names}
        items = {name: _items(found, name, results[name]) for name in names}
        return TaskOutcome(results, {name: metrics for name, metrics in items.items() if metrics})

    def _check(self) -> None:
        """Raise `DataError` for what lm-eval would refuse when it is too late."""
        try:
            loaded = self._manager.load(self._specs)
        except ValueError as error:
            raise DataError(f"--tasks names a task more than once ({error}); name each once.") from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise DataError(f"task '{name}' runs code that the model writes, which is not done here; leave it out.")
            if getattr(task, "MULTIMODAL", False):
                raise DataError(f"task '{name}' needs images or sound, but the model reads text only; leave it out.")

    def _load(self, name: str) -> list[Any]:
        """Return the task or group, or the tasks of a tag, with data: from here or the cache, else from the hub."""
        return from_cache_or_hub(lambda: self._load_now(name), lambda error: _refused(name, error))

    def _load_now(self, name: str) -> list[Any]:
        loaded = self._manager.load([name])
        groups = loaded.get("groups", {})
        inside = {child for children in loaded.get("group_map", {}).values() for child in children}
        tops = [group for group_name, group in groups.items() if group_name not in inside]
        return tops or list(loaded["tasks"].values())


def _refused(name: str, error: Exception) -> DataError:
    return cannot_be_loaded(name, error, "choose tasks with local data, for example --tasks bundled")


def _result(found: dict[str, Any], name: str) -> TaskResult:
    values: dict[str, Any] = found["results"].get(name) or found["groups"][name]
    better = found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in values.items():
        metric, _, of_filter = key.partition(",")
        if not of_filter or metric.endswith("_stderr") or not _is_number(value):
            continue
        stderr: Any = values.get(f"{metric}_stderr,{of_filter}")
        metrics[metric if of_filter == "none" else key] = TaskMetric(
            value=float(value),
            stderr=float(stderr) if _is_number(stderr) else None,
            higher_is_better=bool(better.get(metric, True)),
        )
    leaves = _leaves(found, name)
    group = leaves != [name]
    return TaskResult(
        metrics=metrics,
        items=sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
        num_fewshot=None if group else found["n-shot"].get(name),
        version=str(found["versions"].get(name, "")),
        group=group,
    )


def _items(found: dict[str, Any], name: str, result: TaskResult) -> dict[str, NDArray[np.float64]]:
    """Return the values of the items behind each metric that is their mean."""
    items = {}
    for metric, summary in result.metrics.items():
        base, _, of_filter = metric.partition(",")
        samples = [sample for leaf in _leaves(found, name) for sample in found["samples"][leaf]]
        values = [sample.get(base) for sample in samples if sample["filter"] == (of_filter or "none")]
        if values and all(_is_number(value) for value in values):
            array = np.array(values, dtype=np.float64)
            if math.isclose(float(array.mean()), summary.value, rel_tol=1e-9, abs_tol=1e-12):
                items[metric] = array
    return items


def _leaves(found: dict[str, Any], name: str) -> list[str]:
    children = found.get("group_subtasks", {}).get(name)
    return [leaf for child in children for leaf in _leaves(found, child)] if children else [name]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | bool) and math.isfinite(value)
