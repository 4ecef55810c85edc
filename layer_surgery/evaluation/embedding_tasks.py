"""Tasks of embedding models by mteb (https://github.com/embeddings-benchmark/mteb), through its Python interface.

A task is mteb's own, found by its name, or a class of the user's; `NAME:SUBSET` is one subset of one that has several.
"""

import contextlib
import hashlib
import importlib.util
import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mteb
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.get_tasks import _TASKS_REGISTRY

from layer_surgery.config import TaskConfig
from layer_surgery.errors import DataError, nearest_name
from layer_surgery.evaluation.mteb_encoder import MtebEncoder
from layer_surgery.evaluation.mteb_items import Items
from layer_surgery.evaluation.task_data import cannot_be_loaded, from_cache_or_hub, generators_kept
from layer_surgery.evaluation.task_names import own_classes, stands_in
from layer_surgery.evaluation.task_outcome import TaskOutcome
from layer_surgery.evaluation.text_encoder import TextEncoder
from layer_surgery.progress import Progress
from layer_surgery.records import TaskMetric, TaskResult


class EmbeddingTasks:
    """Tasks with their data loaded, so that nothing about them can go wrong after the first model has been run."""

    def __init__(self, config: TaskConfig) -> None:
        """Load the tasks.

        Raises `DataError` for an unknown task, for one that is not about text, and for one whose data are not here and
        cannot be had.
        """
        self._tasks: dict[str, Any] = {}
        with _quiet(), generators_kept():
            for name in dict.fromkeys(config.tasks):
                self._tasks[name] = _with_data(name, _task(name, config.task_path))

    def run(self, encoder: TextEncoder, progress: Progress) -> TaskOutcome:
        """Run all tasks on a model, as `mteb.evaluate` does on its sentence-transformers."""
        outcome = TaskOutcome({}, {})
        with progress("tasks", len(self._tasks)) as advance:
            for name, task in self._tasks.items():
                # mteb seeds the global generators, and reports on stdout and stderr.
                items = Items(task)
                with _quiet(), generators_kept(), items.listening() as predictions:
                    found: Any = mteb.evaluate(
                        MtebEncoder(encoder),
                        task,
                        cache=None,  # it knows a model by its name, which a result shares with other results
                        co2_tracker=False,
                        encode_kwargs={"batch_size": 32},
                        prediction_folder=predictions,
                        show_progress_bar=False,
                    )
                outcome.results[name] = _result(task, found.task_results[0])
                main = task.metadata.main_score
                values = items.values(outcome.results[name].metrics[main].value)
                if values is not None:
                    outcome.items[name] = {main: values}
                correlated = items.correlated()
                if correlated is not None:
                    outcome.correlated[name] = {main: correlated}
                advance()
        return outcome


def _task(name: str, folders: Iterable[Path]) -> Any:
    """Return the task of a name, without its data."""
    plain, _, subset = name.partition(":")
    if plain.endswith((".yaml", ".yml")):
        raise DataError(f"--tasks names the file {plain}, but embedding models have tasks of mteb; give their names.")
    classes = {each.metadata.name: each for each in _own_tasks(folders, plain)} | _TASKS_REGISTRY
    if plain not in classes:
        raise DataError(
            f"unknown task '{plain}'.{nearest_name(plain, classes)} Embedding models have tasks of mteb, or classes of "
            "your own with --task-path DIR."
        )
    task: Any = classes[plain]()
    if set(task.metadata.modalities) != {"text"}:
        raise DataError(
            f"task '{plain}' needs {' and '.join(task.metadata.modalities)}, but the model reads text only; leave it "
            "out."
        )
    if subset and subset not in task.metadata.hf_subsets:
        raise DataError(
            f"task '{plain}' has no subset '{subset}'.{nearest_name(subset, task.metadata.hf_subsets)} It has: "
            f"{', '.join(task.metadata.hf_subsets)}."
        )
    return task.filter_languages(None, hf_subsets=[subset]) if subset else task


def _own_tasks(folders: Iterable[Path], name: str) -> Iterator[Any]:
    """Run the user's files in which the name of a task stands, and yield the classes of tasks that they define."""
    for file in stands_in(own_classes(folders), name):
        module_name = f"_layer_surgery_tasks_{hashlib.sha256(bytes(file.resolve()) + file.read_bytes()).hexdigest()}"
        if module_name not in sys.modules:
            spec = importlib.util.spec_from_file_location(module_name, file)
            assert spec is not None and spec.loader is not None
            module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                del sys.modules[module_name]
                raise DataError(
                    f"{file}, which names task '{name}', cannot be run ({type(error).__name__}: {error})."
                ) from error
        for found in vars(sys.modules[module_name]).values():
            if isinstance(found, type) and issubclass(found, AbsTask) and found.__module__ == module_name:
                yield found


def _with_data(name: str, task: Any) -> Any:
    """Return the task with its data: from the local cache, else from the hub."""

    def load() -> None:
        for part in _parts(task):
            part.load_data()

    from_cache_or_hub(
        load, lambda error: cannot_be_loaded(name, error, "choose tasks whose data have been downloaded before")
    )
    return task


def _parts(task: Any) -> list[Any]:
    """Return the tasks that are run: those that an aggregate is of, or the task itself."""
    if isinstance(task, AbsTaskAggregate):
        return [part for each in task.metadata.tasks for part in _parts(each)]
    return [task]


def _result(task: Any, found: Any) -> TaskResult:
    """Return the main score of a task; of one with several subsets, that of each too."""
    main = task.metadata.main_score
    scores = [(split, each["hf_subset"], each["main_score"]) for split, own in found.scores.items() for each in own]
    metrics = {main: float(found.get_score())}
    if len(scores) > 1:
        splits = len({split for split, *_ in scores}) > 1
        metrics |= {f"{main},{split + ' ' if splits else ''}{subset}": float(score) for split, subset, score in scores}
    return TaskResult(
        metrics={name: TaskMetric(value=value, stderr=None, higher_is_better=True) for name, value in metrics.items()},
        items=sum(_items(part) for part in _parts(task)),
        num_fewshot=None,
        version=str(task.metadata.revision or ""),
    )


def _items(task: Any) -> int:
    """Return how many rows (or queries) of its data a task has, over all subsets and splits that are evaluated."""
    count = 0
    for subset in task.hf_subsets:
        data = task.dataset.get(subset, task.dataset)
        for split in task.eval_splits:
            rows = data[split]
            count += len(rows["queries"] if isinstance(rows, Mapping) else rows)
    return count


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what mteb prints, logs and warns of from the user's terminal; errors are raised."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("mteb", "datasets"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
