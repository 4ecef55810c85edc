"""Runs of `layer-surgery` that are stopped at one event of the file system, in forks of a process that is warm.

An event is what changes something below the folder of a scenario: a file opened for writing, a write, a rename, an
exchange, a link, a removal, a new directory, an fsync, in Python or in a library. Just before it the process gets a
signal, or the event fails with an error.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from filesystem_events import compiler, prepare, watch_events
from markupsafe import Markup

from layer_surgery.checkpoint.contents import PAGE_FILES, not_ours
from layer_surgery.checkpoint.costs import TokenCosts
from layer_surgery.cli.main import main
from layer_surgery.disk import own
from layer_surgery.reporting.figures import healing, layers, quality, tradeoff
from layer_surgery.reporting.figures.svg import Plot
from layer_surgery.runs import evaluator
from layer_surgery.runs import output as runs_output

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "INT": signal.SIGINT, "HUP": signal.SIGHUP}
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
FAULTS = (*SIGNALS, *ERRORS)
#: Exit codes of a run that was stopped, by the fault; None stands for a process that was killed.
CODES: dict[str, tuple[int | None, ...]] = {
    "KILL": (None,),
    "TERM": (143, 0),
    "INT": (130, 0),
    "HUP": (129, 0),
    **dict.fromkeys(ERRORS, (0, 1, 2)),
}
_NO_FIGURE = '<svg xmlns="http://www.w3.org/2000/svg" width="10pt" height="10pt" viewBox="0 0 10 10"/>'
Watch = Callable[[int], object]
"""Called in a fork, before the command, with the descriptor of its log."""
#: What stands behind an error that nobody has written a sentence for.
_UNEXPECTED = "--debug shows where"
#: What the report says of one run only: times, and hashes and drawings of them.
OF_ONE_RUN = ("surgery.json", "report.html", "README.md", "sweep.json", "sweep.csv", "sweep.md")


@dataclass(frozen=True)
class Ended:
    """The end of a run: its exit code (None: killed), the events that there were, and what it said."""

    code: int | None
    events: list[str]
    said: str


@dataclass(frozen=True)
class Scenario:
    """A command, what is there before it, and what must be there after it."""

    name: str
    command: list[str]  #: The first time.
    again: list[str]  #: The same after a fault, when it may be done already.
    prepare: Callable[[Path], None] = field(default=lambda _folder: None)  #: Makes what is there before.
    result: str = "output"  #: The result, in the folder of the scenario.
    kept: str = ""  #: What a run that is stopped keeps there for the next one.


def run(
    arguments: list[str],
    folder: Path,
    fault: str | None = None,
    at: int = -1,
    watch: Watch | None = None,
    log: Path | None = None,
) -> Ended:
    """Run a command in a fork, in a folder, with a fault at an event (counted from 0); without one, count them.

    `watch` is called in the fork in the place of what counts the events of the file system. What the run says goes to
    `log` (default: beside the folder).
    """
    log = log or folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _in_fork(arguments, folder, log, watch or (lambda log: _watch(folder, log, fault, at)))
    _, status = os.waitpid(child, 0)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return Ended(
        code=None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status),
        events=[_plain(line.removeprefix("event: ")) for line in lines if line.startswith("event: ")],
        said="\n".join(line for line in lines if not line.startswith("event: ")),
    )


def _in_fork(arguments: list[str], folder: Path, log: Path, watch: Watch) -> None:
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        for number in SIGNALS.values():
            if number != signal.SIGKILL:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.chdir(folder)
        (folder / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(folder / "tmp")
        watch(output)
        sys.argv = ["layer-surgery", *arguments]
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        own._remove_all()  # as at the end of a process
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def warm(model: Path, text: Path) -> None:
    """Import and compile here, once for all forks, what runs import and compile, and what counts events."""
    import layer_surgery.reporting.console

    options = {"samples": 4, "sequence_length": 16, "refit_general": 0, "eval_data": None}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        layer_surgery.compress(model, result, layers=[1], keep=0.3, calibration=text, **options)
        layer_surgery.export_dense(result, Path(folder) / "dense")
    if compiler() is not None:
        prepare()
    gc.freeze()  # else every fork copies what its first collection looks at
    _in_large_pages()


def _in_large_pages() -> None:
    """Have the kernel put this process's own memory into pages of 2 MiB, where it can: forks take a third of the time.

    What it does not do is no error: MADV_COLLAPSE (Linux 6.1) refuses what is not in use.
    """
    size, collapse = 2 << 20, 25
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, file = line.split()[:5]
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if rights == "rw-p" and file == "0":
            for place in range(-(-begin // size) * size, end // size * size, size):
                madvise(place, size, collapse)


def leave_out_what_takes_long() -> None:
    """Let a fork neither count costs nor draw a page: nine tenths of the time of a tiny run."""
    costs = TokenCosts(flops=1, kv_cache_bytes=1)
    evaluator.token_costs = lambda *_: costs
    runs_output.write_page_and_card = lambda *_: None  # type: ignore[attr-defined]


def _watch(folder: Path, output: int, fault: str | None, at: int) -> None:
    """Have the fault come at the event of this number."""
    _leave_out_what_is_no_file()
    watch_events(folder, output, at, SIGNALS.get(fault or "", 0), ERRORS.get(fault or "", 0))


def _leave_out_what_is_no_file() -> None:
    """Count no costs and draw no figures: they take half of the time."""
    evaluator.token_costs = lambda *_: TokenCosts(flops=1, kv_cache_bytes=1)
    for module in (healing, layers, quality, tradeoff):
        module.draw = _not_drawn  # type: ignore[attr-defined]


def _not_drawn(key: str, title: str, alternative: str, caption: str, **_: object) -> Plot:
    return Plot(Markup(_NO_FIGURE), title, caption)


def _plain(event: str) -> str:
    """Return an event without what is random in its path: names of ours, of `tempfile`, and of safetensors."""
    return re.sub(r"[0-9a-f]{16}|(?<=/\.tmp)\w{6}$|(?<=-)[a-z0-9_]{8}(?=/|$)", "*", event)


# What must hold


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, of those that say something of one run only an empty text."""
    return {
        path.relative_to(folder).as_posix(): ""
        if path.name in OF_ONE_RUN
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _state(folder: Path) -> str:
    """Return a hash of all that is below a folder, without what is random in names or of one run only."""
    whole = contents(folder)
    found = list[str]()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        digest = whole.get(name, "no file")
        if path.name in ("run.json", "sweep.json"):  # the next run reads it, and shows the times only
            digest = hashlib.sha256(re.sub(rb'"(seconds|time)": [^,}\n]*', b"", path.read_bytes())).hexdigest()
        elif path.name in OF_ONE_RUN:  # whole, or cut short
            digest = path.read_bytes()[-8:].hex()
        found.append(f"{_plain(name)} {digest} {path.is_dir()}")
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


def place_for_faults() -> Path | None:
    """Return a folder in memory, where fsync takes no time; None where there is none."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else None


@dataclass(frozen=True)
class Trial:
    """A scenario set up once: its state before and after, to compare every faulty run with."""

    scenario: Scenario
    folder: Path
    before: dict[str, str]
    after: dict[str, str]
    events: list[str]

    def chosen(self) -> list[int]:
        """Return the events at which a fault is tried: of those that are the same but for numbers, such as the writes
        to a file, or what is done for each layer, the first and the last."""
        kinds: dict[str, list[int]] = {}
        for number, event in enumerate(self.events):
            kinds.setdefault(re.sub(r"\d+", "#", event), []).append(number)
        return sorted({number for numbers in kinds.values() for number in (numbers[0], numbers[-1])})

    @classmethod
    def begin(cls, scenario: Scenario, folder: Path, watch: Watch | None = None) -> Self:
        """Prepare the scenario, and run it once without a fault, with what `run` may be told to watch."""
        folder.mkdir()
        scenario.prepare(folder)
        before = contents(folder)
        template = folder.with_name(f"{folder.name}.before")
        shutil.copytree(folder, template)
        ended = run(scenario.command, folder, watch=watch)
        assert ended.code == 0, ended.said
        return cls(scenario, folder, before, contents(folder), ended.events)

    def codes(self, fault: str) -> tuple[int | None, ...]:
        """Return the exit codes that a run with a fault may have."""
        return CODES[fault]

    def run_with(self, fault: str, at: int) -> Ended:
        """Run the command with a fault."""
        return run(self.scenario.command, self.folder, fault, at)

    def next_run(self) -> Ended:
        """Run the command that follows."""
        return run(self.scenario.again, self.folder, watch=lambda _log: _leave_out_what_is_no_file())

    def problems(self, fault: str, at: int) -> Iterator[str]:
        """Yield what does not hold after a fault at an event, and after the run that follows it."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.folder.with_name(f"{self.folder.name}.before"), self.folder)
        ended = self.run_with(fault, at)
        where = f"{self.scenario.name}, {fault} at {at} ({(ended.events[at : at + 1] or ['?'])[0]})"
        if ended.code not in self.codes(fault):
            yield f"{where}: exit code {ended.code}\n{ended.said}"
        if "Traceback" in ended.said or _UNEXPECTED in ended.said:
            yield f"{where}: a traceback or an error that was not foreseen\n{ended.said}"
        found, kept = contents(self.folder), self.scenario.kept
        if problem := self._not_whole(found):
            yield f"{where}: {problem}\n{ended.said}"
        said_so = "statistics are not kept" in ended.said
        if ended.code == 0 and not said_so and self._of_result(found) != self._of_result(self.after):
            yield f"{where}: exit code 0, but the result is not there: {sorted(found)}\n{ended.said}"
        left = [name for name in self._left(found) if not (kept and name.startswith(kept))]
        if fault in ("TERM", "INT", "HUP") and left:
            yield f"{where}: a run that could clean up has left {left}\n{ended.said}"
        yield from (f"{where}: {problem}\n{ended.said}" for problem in self._after_next_run())

    def _after_next_run(self) -> list[str]:
        """Return what does not hold after the run that follows; it is not run again from a state that was seen before.

        What it does depends on the files that it finds only.
        """
        known = self.folder.with_name(f"{self.folder.name}.seen") / _state(self.folder)
        if known.exists():
            found: list[str] = json.loads(known.read_text())
            return found
        again = self.next_run()
        problems = list[str]()
        if again.code != 0:
            problems.append(f"the next run ends with {again.code}\n{again.said}")
        there = contents(self.folder)
        if self._of_result(there) != self._of_result(self.after):
            problems.append(f"the next run gives something else: {sorted(there)}\n{again.said}")
        if left := self._left(there):
            problems.append(f"after the next run there is {left}\n{again.said}")
        known.parent.mkdir(exist_ok=True)
        known.write_text(json.dumps(problems))
        return problems

    def _not_whole(self, found: dict[str, str]) -> str:
        """Say what is wrong with what stands under the result's own name: it must be the old one or the new one."""
        here = self._of_result(found)
        if self.scenario.name in ("sweep", "cache"):
            file = self.folder / self.scenario.result / "sweep.json"
            if file.exists():
                json.loads(file.read_text())
            return ""
        old, new = self._of_result(self.before), self._of_result(self.after)
        # A page or a card that failed is recorded, and made again by the next run; the model is there.
        without = {f"{self.scenario.result}/{name}" for name in PAGE_FILES} - here.keys()
        if here not in (old, {name: digest for name, digest in new.items() if name not in without}):
            return f"the result is neither the old nor the new one: {sorted(here)}"
        path = self.folder / self.scenario.result
        return (not_ours(path) or "") if path.exists() else ""

    def _of_result(self, found: dict[str, str]) -> dict[str, str]:
        prefix = f"{self.scenario.result}/"
        return {name: digest for name, digest in found.items() if name.startswith(prefix) and "/." not in name}

    def _left(self, found: dict[str, str]) -> list[str]:
        """Return what should not be there: neither of before nor of after, nor a result that was kept in sight."""
        known = {*self.before, *self.after}
        kept = re.compile(rf"{self.scenario.result}(/best)?-(old-)?\d+/")
        hidden = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob(".*")]
        return sorted({name for name in found if name not in known and not kept.match(name)} | {*hidden})


def scenarios(model: Path, low_rank: Path, text: Path) -> list[Scenario]:
    """Return the scenarios: a fresh compression, one over an old result, one that keeps its steps, an export, a sweep,
    a cache, and a healing that keeps what the original says.

    Args:
        model: a checkpoint with four layers.
        low_rank: a result of it with low-rank layers.
        text: to calibrate on.
    """
    data = ["--calibration", str(text), "--samples", "4", "--sequence-length", "16"]
    removal = ["--keep", "0", "--no-refit", "--no-eval", "--output", "output"]
    fresh = ["compress", str(model), "--layers", "1", *removal]
    export = ["export", str(low_rank), "--dense", "--output", "output"]
    sweep = ["sweep", str(model), "--target-layers", "3,2", "--method", "remove", "--scorer", "last", *data]
    sweep += ["--eval-data", str(text), "--eval-windows", "2", "--continuations", "0", "--output", "output"]
    sweep += ["--best", "perplexity<=1000x"]
    score = ["score", str(model), *data, "--cache", "output"]
    resumed = ["compress", str(model), "--layers", "1", "--keep", "0.3", "--method", "fisher", *data, "--no-eval"]
    resumed += ["--refit-general", "0", "--output", "output", "--resume", "work"]
    heal = ["heal", str(low_rank), "--teacher", str(model), "--data", str(text), "--sequence-length", "16"]
    heal += ["--tokens", "64", "--learning-rate", "1e-3", "--step-sequences", "2", "--general", "0", "--no-eval"]
    heal += ["--teacher-cache", "cache", "--output", "output"]

    def old(folder: Path) -> None:
        ended = run(["compress", str(model), "--layers", "2", *removal], folder)
        assert ended.code == 0, ended.said

    return [
        Scenario("fresh", fresh, [*fresh, "--overwrite"]),
        Scenario("overwrite", [*fresh, "--overwrite"], [*fresh, "--overwrite"], old),
        Scenario("resume", resumed, [*resumed, "--overwrite"], kept="work/"),
        Scenario("export", export, [*export, "--overwrite"]),
        Scenario("sweep", sweep, sweep),
        Scenario("cache", score, score),
        Scenario("heal", heal, [*heal, "--overwrite"]),
    ]
