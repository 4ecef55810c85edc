"""Labels as they stand in data, as the numbers of a head."""

import math

from layer_surgery.data.objective import Objective
from layer_surgery.errors import DataError, nearest_name

_SHOWN = 8  #: Labels that an error lists.


def label_number(value: object, objective: Objective, at: str) -> int:
    """Return the number of a label that is given by name or by number. Raises `DataError`, which begins with `at`."""
    names = objective.labels
    if isinstance(value, str) and value in names:
        return names.index(value)
    number = _whole(value)
    if number is not None and 0 <= number < len(names):
        return number
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    near = nearest_name(value, names) if isinstance(value, str) else ""
    raise DataError(
        f"{at}: the label {value!r} is none of the head's {len(names)} ({shown}, or 0 to {len(names) - 1});{near} use "
        "its names or numbers (id2label in config.json)."
    )


def label_set(value: object, objective: Objective, at: str) -> list[float]:
    """Return 1 for every label of the head that is among those given, else 0.

    Args:
        value: a label, a list of labels, or a list of true and false (or 1.0 and 0.0) with one for each of the head's.

    Raises `DataError`, which begins with `at`, also for a list of whole numbers that may be meant in either way.
    """
    given = list(value) if isinstance(value, list | tuple) else [value]
    count = len(objective.labels)
    if len(given) == count and all(isinstance(each, bool | float) and each in (0, 1) for each in given):
        return [float(each) for each in given]  # type: ignore[arg-type]
    chosen = [label_number(each, objective, at) for each in given]
    numbered = not any(isinstance(each, str) for each in given)
    if numbered and (len(set(chosen)) < len(chosen) or (chosen in ([0, 1], [1, 0]) and count == 2 and chosen == given)):
        raise DataError(
            f"{at}: the labels {value!r} may be numbers of labels, or 0 or 1 for each of the head's {count}; write "
            "each label once, by its name, or true or false for each of the head's."
        )
    return [float(number in chosen) for number in range(count)]


def numbers(value: object, objective: Objective, at: str) -> list[float]:
    """Return what a regression is to give, a finite number for each output of the head."""
    given = value if isinstance(value, list | tuple) else [value]
    found = [_finite(each) for each in given]
    if len(found) != len(objective.labels) or None in found:
        wanted = "a number" if len(objective.labels) == 1 else f"a list of {len(objective.labels)} numbers"
        raise DataError(f"{at}: the label {value!r} is not {wanted}, which the head (a regression) gives.")
    return [number for number in found if number is not None]


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) else None


def _finite(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
