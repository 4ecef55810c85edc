"""Numbers and names as text, the same on the terminal, on the page and in the card."""

from collections.abc import Sequence

from layer_surgery.records import Action, Interval

#: Words for what is done to a layer.
ACTION_NAMES: dict[Action, str] = {"keep": "whole", "low_rank": "low-rank", "reduce": "smaller", "remove": "removed"}


def percent_change(values: Sequence[float]) -> str:
    """Return the change from the first of two values to the second; "" if it cannot be said."""
    return f"{(values[1] / values[0] - 1) * 100:+.1f} %" if len(values) == 2 and values[0] else ""


def with_interval(interval: Interval, form: str) -> str:
    """Return `value [low, high]`, each in the format `form`."""
    return f"{interval.value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def with_error(value: float, stderr: float | None, form: str = ",.2f") -> str:
    """Return `value ± standard error`."""
    return f"{value:.4g}" if stderr is None else f"{value:{form}} ± {stderr:{form}}"


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last parts of names, and of those that end alike (GPT-2's two `c_proj`) as many as tell them apart."""
    lasts = [name.rpartition(".")[2] for name in names]
    return [last if lasts.count(last) == 1 else name for name, last in zip(names, lasts, strict=True)]


def number_list(numbers: Sequence[int]) -> str:
    """Return ascending numbers with runs of three or more drawn together: `1, 4-6, 9`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
