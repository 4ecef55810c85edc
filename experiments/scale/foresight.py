"""Is what `--dry-run` says true? Its figures beside those of the run that follows, on both bundled checkpoints.

    python experiments/scale/foresight.py [--samples 128]
    python experiments/scale/foresight.py --heal --cpu-time

Each dry run and each run is a process of its own, one after the other, with the same options: nine of twelve, or twelve
of sixteen layers left whole by the default method, perplexity and distance on the bundled text. With `--heal` a result
of the demo checkpoint, three of its layers of low rank, is healed in several ways, and the report is another. Peak
memory is what the kernel reports of the process.

On a machine that does something else, times say little. With `--cpu-time` all times, of the probe and of the runs, are
of the processor and not of the clock, on one thread: what a probe says of a run can be seen then all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

#: What stands before the program where times are to be of the processor.
CPU_TIME = """
import runpy, sys, time
time.perf_counter = time.process_time
sys.argv[0] = "layer-surgery"
runpy.run_module("layer_surgery", run_name="__main__")
"""
#: Ways of healing on the bundled text, in eight steps of four windows. A learning rate that is given is not looked for.
_GIVEN = ("--learning-rate", "1e-4")
HEALINGS = {
    "all weights": (),
    "adapters, learning rate given": ("--train", "lora", *_GIVEN),
    "both models, learning rate given": ("--both-models", *_GIVEN),
    "states too, learning rate given": ("--loss", "kl", "--loss", "cosine", *_GIVEN),
    "local stage alone, learning rate given": ("--stages", "local", *_GIVEN),
}
CHECKPOINTS = {"demo": (DEMO_CHECKPOINT, 9), "second": (ROOT / "experiments/second_checkpoint/checkpoint", 12)}


class Runner(NamedTuple):
    """Runs the program with the same options twice: dry, and wet."""

    cpu_time: bool

    def __call__(self, *arguments: str) -> dict[str, Any]:
        """Run a command and return its JSON."""
        program = ["-c", CPU_TIME] if self.cpu_time else ["-m", "layer_surgery"]
        command = [sys.executable, *program, *arguments, "--device", "cpu", "--json", "--quiet"]
        threads = {"OMP_NUM_THREADS": "1"} if self.cpu_time else {}
        found = subprocess.run(
            command,
            check=True,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | threads,
        )
        record: dict[str, Any] = json.loads(found.stdout)
        return record

    def compared(self, *arguments: str) -> dict[str, Any]:
        """Return the figures of the dry run, those of the run, and their ratios."""
        foreseen = self(*arguments, "--dry-run")
        return compared(foreseen, self(*arguments, "--no-save"))


def compared(foreseen: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a dry run, those of a run, and their ratios."""
    stages = {}
    for stage in foreseen["stages"]:
        actual = report["timings"].get(stage["name"])
        if actual:
            ratio = round(stage["seconds"] / actual, 3)
            stages[stage["name"]] = {"foreseen": round(stage["seconds"], 2), "measured": actual, "ratio": ratio}
    totals = [sum(stage[key] for stage in stages.values()) for key in ("foreseen", "measured")]
    memory = foreseen["memory_bytes"], report["peak_memory_bytes"]
    return {
        "seconds": stages,
        "seconds in all": {"foreseen": totals[0], "measured": totals[1], "ratio": round(totals[0] / totals[1], 3)},
        "memory": {"foreseen": memory[0], "measured": memory[1], "ratio": round(memory[0] / memory[1], 3)},
        "probe": foreseen["probed"],
    }


def compressions(runner: Runner, samples: int) -> Iterator[dict[str, Any]]:
    """Compare the compression of both checkpoints; yield what there is so far."""
    found = {}
    for name, (checkpoint, target) in CHECKPOINTS.items():
        options = ["--target-layers", str(target), "--samples", str(samples), "--continuations", "0"]
        found[name] = runner.compared("compress", str(checkpoint), *options)
        print(name, json.dumps(found[name], indent=1), flush=True)
        yield {"samples": samples, "checkpoints": found}


def healings(runner: Runner) -> Iterator[dict[str, Any]]:
    """Compare ways of healing a result of the demo checkpoint, one after the other; yield what there is so far."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        result = f"{folder}/result"
        surgery = ["--layers", "2,6,9", "--keep", "0.2", "--method", "svd_llm", "--samples", "32", "--no-refit"]
        runner("compress", str(DEMO_CHECKPOINT), *surgery, "--no-eval", "--continuations", "0", "--output", result)
        for name, options in HEALINGS.items():
            arguments = ["--data", "bundled", "--tokens", "8192", "--step-sequences", "4", *options]
            arguments += ["--eval-windows", "8", "--continuations", "0"]
            found[name] = {"options": " ".join(arguments)} | runner.compared("heal", result, *arguments)
            print(name, json.dumps(found[name], indent=1), flush=True)
            yield {"healings": found}


def main() -> None:
    """Compare and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--heal", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--report", type=Path, help="default: reports/scale/foresight.json or foresight_heal.json")
    arguments = parser.parse_args()
    runner, loaded = Runner(arguments.cpu_time), os.getloadavg()[0]
    name = "foresight_heal.json" if arguments.heal else "foresight.json"
    times = "of the processor" if arguments.cpu_time else "of the clock"
    for found in healings(runner) if arguments.heal else compressions(runner, arguments.samples):
        known = {"times": times, "load average before and after": [loaded, os.getloadavg()[0]]}
        write_report(arguments.report or ROOT / "reports" / "scale" / name, known | found)


if __name__ == "__main__":
    main()
