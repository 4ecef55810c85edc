"""The stages of each run, as its user is told of them, with the work that is known before it begins.

Work only serves to say about how long a run will take. Its unit is one token through all layers and the head of the
model; numbers of passes are those of the demo checkpoint on a CPU, in round figures.
"""

from collections.abc import Sequence

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.progress import Stage
from layer_surgery.runs.planning import Planning

#: Passes over the calibration tokens in which statistics of all layers are made, and those for their use afterwards.
_STATISTICS, _SEARCH = 18.0, 3.0
#: Passes that a scorer takes. Others, such as those that remove layers in turn, take as many as the model makes them.
PASSES_OF_SCORERS = {
    "random": 0.0,
    "last": 0.0,
    "block_influence": 1.0,
    "angular": 1.0,
    "taylor": 3.0,
    "fisher": _STATISTICS,
}
#: Passes that a method takes; those of `WITH_STATISTICS` also make them, if the scorer has not.
PASSES_OF_METHODS = {"remove": 0.0, "svd_llm": 2.0, "replaceme": 3.0, "grasp": 4.0, "fisher": _SEARCH, "mix": _SEARCH}
#: Methods that choose by the statistics of all layers, and the scorer that does.
WITH_STATISTICS = ("fisher", "mix")
FISHER = "fisher"
_REFIT = 36.0


def stages_of_compression(
    planning: Planning,
    texts: Sequence[PackedTokens],
    tokens: PackedTokens | None,
    *,
    scored: bool,
    saved: bool,
    healed: bool = False,
) -> list[Stage]:
    """Return the stages of `compress`.

    Args:
        tokens: for calibration.
        scored: whether the layers are ranked in this run.
        saved: whether the result is written.
        healed: whether the result is healed.
    """
    calibration = _tokens([tokens] if tokens is not None else [])
    scorer, method = planning.config.scorer, planning.method
    stages = [_evaluation("evaluate_before", "evaluating the original", texts)]
    if scored:
        stages.append(
            Stage("score", f"ranking the layers ({scorer})", work=_passes(PASSES_OF_SCORERS.get(scorer), calibration))
        )
    if planning.trial.smaller or method.removes:
        passes = PASSES_OF_METHODS.get(method.name)
        if method.name in WITH_STATISTICS and not (scored and scorer == FISHER):
            passes = _STATISTICS + _SEARCH
        stages.append(Stage("operate", f"operating ({method.name})", work=_passes(passes, calibration)))
    if planning.refit_scope is not None:
        stages.append(Stage("refit", "refitting", work=_REFIT * calibration))
    if healed:
        stages += _healing(texts)
    stages.append(_evaluation("evaluate_after", "evaluating the result", texts))
    if saved:
        stages.append(Stage("save", "saving", work=0.0))
    return stages


def stages_of_healing(texts: Sequence[PackedTokens], *, saved: bool) -> list[Stage]:
    """Return the stages of `heal`; `saved` says whether the result is written."""
    stages = [_evaluation("evaluate_before", "evaluating the original", texts), *_healing(texts)]
    stages.append(_evaluation("evaluate_after", "evaluating the result", texts))
    return [*stages, Stage("save", "saving", work=0.0)] if saved else stages


def _healing(texts: Sequence[PackedTokens]) -> list[Stage]:
    """Return the stages between the surgery and the evaluation of a healed result."""
    return [_evaluation("evaluate_unhealed", "evaluating the model before healing", texts), Stage("heal", "healing")]


def stages_of_evaluation(texts: Sequence[PackedTokens], *, baseline: bool) -> list[Stage]:
    """Return the stages of `evaluate`."""
    first = [_evaluation("evaluate_before", "evaluating the baseline", texts)] * baseline
    return [*first, _evaluation("evaluate_after", "evaluating the model", texts)]


def stages_of_sweep(points: int, texts: Sequence[PackedTokens]) -> list[Stage]:
    """Return the stages of `sweep` with so many points to measure; point k, from 1 on, is `point k`."""
    numbers = range(1, points + 1)
    return [
        _evaluation("evaluate_before", "evaluating the original", texts),
        *(Stage(f"point {number}", f"measuring point {number} of {points}", kind="point") for number in numbers),
    ]


def _evaluation(name: str, title: str, texts: Sequence[PackedTokens]) -> Stage:
    """Return a stage that measures one model. Its work are the texts, not tasks, continuations and speed."""
    return Stage(name, title, kind="evaluation", work=_tokens(texts), steps=("forward", "head"))


def _tokens(data: Sequence[PackedTokens]) -> float:
    return float(sum(int(tokens.valid.sum()) for tokens in data))


def _passes(passes: float | None, tokens: float) -> float | None:
    return None if passes is None else passes * tokens
