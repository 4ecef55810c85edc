"""Is what `--dry-run` says true? Its figures beside those of the run that follows, on both bundled checkpoints.

    python experiments/scale/foresight.py [--samples 128]

Each dry run and each run is a process of its own, one after the other, with the same options: nine of twelve, or twelve
of sixteen layers left whole by the default method, perplexity and distance on the bundled text. Peak memory is what the
kernel reports of the process. On a machine that does something else, times say little.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

CHECKPOINTS = {"demo": (DEMO_CHECKPOINT, 9), "second": (ROOT / "experiments/second_checkpoint/checkpoint", 12)}


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a command and return its JSON."""
    command = [sys.executable, "-m", "layer_surgery", "compress", *arguments, "--device", "cpu", "--json", "--quiet"]
    found = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    record: dict[str, Any] = json.loads(found.stdout)
    return record


def compared(checkpoint: Path, target: int, samples: int) -> dict[str, Any]:
    """Return the figures of the dry run, those of the run, and their ratios."""
    options = [str(checkpoint), "--target-layers", str(target), "--samples", str(samples), "--continuations", "0"]
    foreseen = run([*options, "--dry-run"])
    report = run([*options, "--no-save"])
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


def main() -> None:
    """Compare both checkpoints and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "scale" / "foresight.json")
    arguments = parser.parse_args()
    found = {}
    for name, (checkpoint, target) in CHECKPOINTS.items():
        found[name] = compared(checkpoint, target, arguments.samples)
        print(name, json.dumps(found[name], indent=1), flush=True)
    write_report(arguments.report, {"samples": arguments.samples, "checkpoints": found})


if __name__ == "__main__":
    main()
