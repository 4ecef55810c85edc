"""Hostile cases tried by the hundred in forks of a process that is warm, what came of each, and a record of it.

A case is a number, and all that is random in it comes from that number. So a record goes on where it stopped, and a
case that failed can be tried alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from layer_surgery.errors import LayerSurgeryError, describe, exit_code
from layer_surgery.machine import provenance

FINE, REFUSED, LOST, WRONG, HANG, RAW = "fine", "refused", "lost", "silently wrong", "hang", "raw error"
OUTCOMES = (FINE, REFUSED, LOST, WRONG, HANG, RAW)
#: Seconds that a case may take: of this process's work, and, where it waits for others, in all.
_TIMERS = ((signal.ITIMER_PROF, signal.SIGPROF, 20.0), (signal.ITIMER_REAL, signal.SIGALRM, 600.0))
_AT_ONCE = 50
#: Failures that are written down for each kind and outcome.
_KEPT = 20
Outcome = tuple[str, str]
"""What came of a case, and what was said."""


class Hang(BaseException):
    """A case takes too long."""


def outcome_of(case: Callable[[], Outcome | None]) -> Outcome:
    """Return what comes of a case in this process: fine if it returns None, refused if it raises what users may see."""

    def stop(*_: object) -> None:
        raise Hang

    for timer, number, seconds in _TIMERS:
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    try:
        return case() or (FINE, "")
    except Hang:
        return HANG, "".join(traceback.format_exc().splitlines(keepends=True)[-4:])
    except Exception as error:
        said = describe(error)
        if said and (isinstance(error, LayerSurgeryError) or (isinstance(error, OSError) and exit_code(error) == 2)):
            return REFUSED, said
        return RAW, f"{type(error).__name__}: {error}\n" + "".join(
            traceback.format_exc().splitlines(keepends=True)[-8:]
        )
    finally:
        for timer, _, _ in _TIMERS:
            signal.setitimer(timer, 0)


def of_problems(problems: list[str]) -> Outcome:
    """Return what the problems of a trial (`tests/fault_injection.py`) come to."""
    said = "\n".join(problems)
    if "neither the old nor the new" in said or "the result is not there" in said:
        return LOST, said
    if "something else" in said:
        return WRONG, said
    return RAW, said


def in_forks(cases: list[int], attempt: Callable[[int], Outcome | None]) -> dict[int, Outcome]:
    """Return what came of some cases, tried one after the other in a fork; one that kills it is tried alone."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            with open(write, "w", encoding="utf-8", errors="replace") as file:
                for number in cases:
                    found = outcome_of(lambda number=number: attempt(number))  # type: ignore[misc]
                    file.write(json.dumps([number, *found]) + "\n")
                    file.flush()
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        found = {number: (outcome, said) for number, outcome, said in map(json.loads, file)}
    _, status = os.waitpid(child, 0)
    rest = [number for number in cases if number not in found]
    if rest:
        found[rest[0]] = (RAW, f"the process died ({os.waitstatus_to_exitcode(status)})")
        if rest[1:]:
            found |= in_forks(rest[1:], attempt)
    return found


class Record:
    """A JSON file of how many cases of each kind came to what, with the failures."""

    def __init__(self, path: Path | None, what: str) -> None:
        self.path = path
        self.data: dict[str, Any] = {"what": what, "kinds": {}}
        if path is not None and path.exists():
            self.data = json.loads(path.read_text(encoding="utf-8"))

    def done(self, kind: str) -> int:
        """Return how many cases of a kind have been tried."""
        return sum(self.data["kinds"].get(kind, {}).get("outcomes", {}).values())

    def add(self, kind: str, found: dict[int, Outcome]) -> None:
        entry = self.data["kinds"].setdefault(kind, {"outcomes": dict.fromkeys(OUTCOMES, 0), "failures": []})
        for number, (outcome, said) in sorted(found.items()):
            entry["outcomes"][outcome] += 1
            if outcome not in (FINE, REFUSED):
                known = Counter(failure["outcome"] for failure in entry["failures"])
                if known[outcome] < _KEPT:
                    entry["failures"].append({"case": number, "outcome": outcome, "said": _shown(said)})
                print(f"{kind} {number}: {outcome}: {said}", flush=True)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.data["provenance"] = provenance(torch.device("cpu"))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.data, indent=1) + "\n"
            staging = self.path.with_suffix(".partial")
            staging.write_text(text, encoding="utf-8")
            staging.replace(self.path)

    @property
    def failed(self) -> bool:
        return any(
            count and outcome not in (FINE, REFUSED)
            for entry in self.data["kinds"].values()
            for outcome, count in entry["outcomes"].items()
        )


def options(description: str | None, count: int | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all of these scripts; without a count all cases are tried."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if count is not None:
        parser.add_argument("--count", type=int, default=count, help=f"Cases in all (default {count:,}).")
    parser.add_argument("--kind", action="append", help="Only this kind.")
    parser.add_argument("--case", type=int, help="Only the case of this number, with what it says.")
    parser.add_argument("--minutes", type=float, help="Stop after so long; the same command goes on.")
    parser.add_argument("--output", type=Path, help="The record; one that is there is gone on with.")
    return parser


def try_all(
    what: str,
    kinds: dict[str, Callable[[int], Outcome | None]],
    given: argparse.Namespace,
    at_once: int = _AT_ONCE,
    counts: Mapping[str, int] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Try cases 0, 1, ... of every kind, as many of each, and end the process with 1 if one of them failed.

    With `counts`, a kind has so many cases; `about` goes to the record.
    """
    torch.set_num_threads(1)  # forks have no other threads
    gc.freeze()
    chosen = {kind: attempt for kind, attempt in kinds.items() if not given.kind or kind in given.kind}
    if given.case is not None:
        for kind, attempt in chosen.items():
            print(kind, *outcome_of(lambda attempt=attempt: attempt(given.case)))  # type: ignore[misc]
        return
    record, begun = Record(given.output, what), time.monotonic()
    record.data |= about or {}
    wanted = counts or dict.fromkeys(kinds, -(-given.count // len(kinds)))
    while any(record.done(kind) < wanted[kind] for kind in chosen):
        for kind, attempt in chosen.items():
            first = record.done(kind)
            cases = [*range(first, min(first + at_once, wanted[kind]))]
            if cases:
                record.add(kind, in_forks(cases, attempt))
        if given.minutes is not None and time.monotonic() - begun > 60 * given.minutes:
            break
    for kind in chosen:
        print(kind, record.data["kinds"].get(kind, {}).get("outcomes"))
    sys.exit(record.failed)


def _shown(said: str) -> str:
    """Return what was said without the folders of the machine."""
    return re.sub(r"(?<![\w.])/(?:dev/shm|tmp|work|usr|root|home)/(?:[^\s'\":,;()]*/)?", "", said)[:2000]
