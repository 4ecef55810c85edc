"""What each item of a task of mteb contributes to its main score, which mteb itself gives as one number only.

Known for retrieval (nDCG of each query) and for semantic textual similarity (the cosine of each pair, beside what it
should be), of a task with one subset and split.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS

from layer_surgery.evaluation.correlations import Correlated
from layer_surgery.evaluation.uncertainty import Array

_AT = "_at_"
#: mteb rounds its scores to five decimals.
_ROUNDING = 1e-5


class Items:
    """Listens while a task is run."""

    def __init__(self, task: Any) -> None:
        self._task, self._queries = task, list[dict[str, dict[str, float]]]()
        self._main: str = task.metadata.main_score
        self._predictions: dict[str, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[Path | None]:
        """Give the folder in which mteb is to write its predictions, or None."""
        task: Any = self._task
        if isinstance(task, AbsTaskSTS) and self._main == "cosine_spearman":
            with tempfile.TemporaryDirectory(prefix="layer-surgery-") as folder:
                yield Path(folder)
                self._predictions = json.loads((Path(folder) / task.prediction_file_name).read_text(encoding="utf-8"))
        elif isinstance(task, AbsTaskRetrieval):
            own = task.task_specific_scores  # called with the scores of each query

            def listen(scores: dict[str, dict[str, float]], *args: Any, **more: Any) -> Any:
                self._queries.append(scores)
                return own(scores, *args, **more)

            task.task_specific_scores = listen
            try:
                yield None
            finally:
                del task.task_specific_scores
        else:
            yield None

    def values(self, score: float) -> Array | None:
        """Return the values [N] of which the main score is the mean, in the order of the queries' names."""
        if len(self._queries) != 1 or _AT not in self._main:
            return None
        name = self._main.replace(_AT, "_cut_")  # as pytrec_eval has it
        (scores,) = self._queries
        found = [scores[query].get(name) for query in sorted(scores)]
        if not found or None in found:
            return None
        values = np.array(found, dtype=np.float64)
        return values if abs(values.mean() - score) <= _ROUNDING else None

    def correlated(self) -> Correlated | None:
        """Return the cosine of each pair and what people say of it, of which the main score is the correlation."""
        subsets = [own for name, own in self._predictions.items() if name in self._task.hf_subsets]
        if len(subsets) != 1 or len(subsets[0]) != 1:
            return None
        ((split, found),) = subsets[0].items()
        data = self._task.dataset.get(self._task.hf_subsets[0], self._task.dataset)[split]
        return Correlated(np.array(found["cosine_scores"]), np.array(data["score"], dtype=np.float64))
