"""Write reports/faults/results.md from the JSON files beside it: how much was tried, and what came of it.

python experiments/faults/page.py
"""

import json
from pathlib import Path
from typing import Any

REPORTS = Path(__file__).resolve().parents[2] / "reports" / "faults"
OUTCOMES = ("fine", "refused", "lost", "silently wrong", "hang", "raw error")
SCRIPTS = ("every_fault", "instants", "races", "damaged_checkpoints", "fuzzed_files", "fuzzed_healing")
#: Cases that `instants.py` tries where it is not told otherwise.
_INSTANTS = 1000
HEAD = """# Faults

Made by `experiments/faults/page.py` from the JSON files in this folder, which have the failures and the provenance.
*Refused*: one sentence and exit code 1 or 2. *Lost*: a result that was there, or that a run with exit code 0 has made,
is not there. *Silently wrong*: exit code 0 and something else than what is right. *Hang*: more than 20 seconds of work,
or 10 minutes in all. *Raw error*: a traceback, an error that names no mistake, or something left behind. Of a case that
failed, the number is in the JSON; `--case N --kind KIND` tries it alone. Checkpoints are tiny, and figures are not
drawn.

After a fault the same command is run again. Where the folder holds what it held after an earlier fault of the scenario
(names but for their random part, the bytes of all files but pages and times), what came of that run counts for both.

## What was found on the way, and how it was mended

- `damaged_checkpoints.py`, "bit of a header" 254 and 325, silently wrong: a flipped bit in the name of one of several
  experts (`experts*2.w1`) put the experts of a layer in another order. Names that are not numbered 0, 1, ... are
  refused (`checkpoint/conversion.py`).
- `every_fault.py`, cache, four cases of an fsync that fails: an error of Python's. The run goes on without the cache
  now, and says so (`calibration/cache.py`).
- resume, a folder that cannot be made, and what only one step needed cannot be removed: an error of Python's. The run
  goes on and keeps nothing more, or what is left goes with the next run (`journal/steps.py`).
- sweep, the page of the best model cannot be written: exit code 0, and no later run made it. The exit code is 1 now,
  and the same command saves it again (`runs/sweep/run.py`).
- sweep, a directory of its own that cannot be removed at once stayed for good: it is tried again when the process
  ends (`disk/own.py`).
- heal, weights of the training cannot be written: an error of safetensors'. One sentence now (`healing/trainee.py`).
- `every_fault.py`, all scenarios: a folder for scratch files that cannot be made was an error of Python's. One sentence
  now (`parallel/group.py`).
- cache, a folder within it that cannot be made: an error of Python's. The run goes on without the cache. And what a run
  that was killed at its very end has left stayed while its statistics were used: it goes with the next run
  (`calibration/cache.py`).
- `instants.py`, export 13 and cache 26, raw errors: a signal in the middle of a figure or of making a tensor, of which
  matplotlib and torch make a `ValueError`. What fails after a signal ends as a run that it has stopped
  (`cli/stopping.py`).
- `instants.py`, cache 11, a raw error and exit code 0: a signal in a callback of the interpreter's own (an import's
  lock, a finalizer), which drops whatever is raised there. The signal comes again after such a callback now
  (`cli/stopping.py`).
- `every_fault.py`, resume: killed while it wrote its first file, a run was refused for ever after; a folder that could
  not be removed at the end failed a run that was done. Heal: a lock of a teacher cache that could not be made was an
  error of Python's. Sweep: a lock that could not be removed stayed (`journal/run.py`, `healing/asking.py`,
  `runs/sweep/state.py`; these three scenarios were begun anew).
- By reading: a disk that is full while hidden states are kept on it was an error of Python's (`walk/boundaries.py`).
- By reading: answers of the original (`--teacher-cache`) that were changed on disk were used; two runs could write one
  teacher cache; a capture that was killed before its first header was refused for ever; nothing of it was synced; a
  pipe as `--loss FILE` or in a teacher cache was waited for; damaged checkpoints of a training, or one of another
  length, ended in errors of libraries or were gone on with (`healing/`).
"""


def read(name: str) -> dict[str, Any] | None:
    """Return a report; None if it has not been made."""
    path = REPORTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def outcomes(name: str) -> list[str]:
    """Return a section on the cases of one script, by kind."""
    report = read(name)
    if report is None:
        return []
    lines = [f"## {report['what'].capitalize()}", ""]
    lines += [f"| `{name}.py` | cases | {' | '.join(OUTCOMES)} |", "|---|" + "---:|" * (len(OUTCOMES) + 1)]
    totals = dict.fromkeys(OUTCOMES, 0)
    for kind, entry in report["kinds"].items():
        counts = entry["outcomes"]
        totals = {outcome: totals[outcome] + counts[outcome] for outcome in OUTCOMES}
        lines.append(_row(kind, counts))
    lines += [_row("**all**", totals), ""]
    if name == "instants" and (done := sum(totals.values())) < _INSTANTS:
        lines += [f"Tried so far are {done:,} of {_INSTANTS:,}.", ""]
    if events := report.get("events"):
        said = [f"{name} {each['tried']} of {each['events']}" for name, each in events.items()]
        lines += [f"Events that are tried, of all (the rest are the same but for a number): {', '.join(said)}.", ""]
        every = sum(each["faults"] * each["tried"] for each in events.values())
        done = sum(totals.values())
        order = "in an order drawn at random that begins with KILL, one other signal and one error at each event"
        so_far = "" if done == every else f" Tried so far are {done:,}, {order}."
        lines += [f"Each by seven faults, {every:,} cases in all.{so_far}", ""]
    return lines


def _row(kind: str, counts: dict[str, int]) -> str:
    return f"| {kind} | {sum(counts.values()):,} | " + " | ".join(f"{counts[name]:,}" for name in OUTCOMES) + " |"


def resume() -> list[str]:
    """Return the section on runs that were killed at their layers."""
    report = read("resume")
    if report is None:
        return []
    lines = ["## Runs killed at a layer, and gone on with", "", "| `resume.py` | steps | kills | problems |"]
    lines.append("|---|---:|---:|---:|")
    lines += [f"| {name} | {e['steps']} | {e['kills']} | {e['problems']} |" for name, e in report["tried"].items()]
    return [*lines, ""]


def environments() -> list[str]:
    """Return the section on environments."""
    report = read("environments")
    if report is None:
        return []
    commands = [*next(iter(report["tried"].values()))]
    lines = ["## Environments", "", f"| `environments.py` | {' | '.join(commands)} |", "|---|" + "---|" * len(commands)]
    lines += [
        f"| {name} | " + " | ".join("works" if found[each] == "works" else "**fails**" for each in commands) + " |"
        for name, found in report["tried"].items()
    ]
    return [*lines, ""]


def main() -> None:
    sections = [line for name in SCRIPTS for line in outcomes(name)]
    (REPORTS / "results.md").write_text("\n".join([HEAD, *resume(), *sections, *environments()]).rstrip() + "\n")


if __name__ == "__main__":
    main()
