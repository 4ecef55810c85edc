"""The checks that the tests run on tiny models too (tests/consumer_checks.py), in the environment of the project."""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))

from cells import Case, NothingToDo, main
from consumer_checks import CHECKS, Subject, low_rank_of


def checked(name: str, case: Case) -> str:
    directory = Path(case.directory)
    if CHECKS[name].factors_only and not any(low_rank_of(directory).values()):
        raise NothingToDo("there are no factors")
    CHECKS[name].function(Subject(directory, case.scratch))
    return ""


if __name__ == "__main__":
    main({name: partial(checked, name) for name in CHECKS})
