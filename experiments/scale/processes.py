"""How much faster are statistics and refit with several processes of one thread each?

    python experiments/scale/processes.py [MODEL] [--processes 1 2] [--repeats 3] [--samples 128]

Each run is a `compress` by itself, which operates on the layers 2, 6 and 9 with the method `fisher` and measures
nothing; runs with different numbers of processes take turns. Reported are medians of the seconds of each stage (of the
first process; none ends a stage before the others do), their ratio to one process, the peak memory of the first
process, and whether all runs have written the same bytes. On a machine that does something else the ratios mean little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

STAGES = ("operate", "refit")  # the statistics are collected when the method asks for them
OPTIONS = ["--method", "fisher", "--layers", "2,6,9", "--keep", "0.2", "--no-eval", "--device", "cpu"]


def run(count: int, options: list[str], output: Path) -> dict[str, Any]:
    """Compress in so many processes; return the seconds of the stages, peak memory and a hash of the weights."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *launcher, "-m", "layer_surgery", "compress", *options, f"--output={output}"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    report = json.loads((output / "surgery.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    for file in sorted(output.glob("*.safetensors")):
        digest.update(file.read_bytes())
    seconds = {stage: report["timings"][stage] for stage in STAGES}
    return {**seconds, "peak_memory_bytes": report["peak_memory_bytes"], "sha256": digest.hexdigest()}


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "scale" / "processes.json")
    arguments = parser.parse_args()
    tokens = [f"--samples={arguments.samples}", f"--sequence-length={arguments.sequence_length}"]
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in arguments.processes}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(arguments.repeats):
            for count, runs in found.items():
                output = Path(folder) / f"{count}-{repeat}"
                runs.append(run(count, [arguments.model, *OPTIONS, *tokens], output))
                print(count, runs[-1], flush=True)
    stages = {
        count: {name: median(run[name] for run in runs) for name in (*STAGES, "peak_memory_bytes")}
        for count, runs in found.items()
    }
    one = stages[arguments.processes[0]]
    ratios = {count: {name: one[name] / each[name] for name in STAGES} for count, each in stages.items()}
    same = len({run["sha256"] for runs in found.values() for run in runs}) == 1
    settings = {"model": arguments.model, "samples": arguments.samples, "repeats": arguments.repeats}
    write_report(arguments.report, {**settings, "medians": stages, "times_as_fast": ratios, "same_bytes": same})


if __name__ == "__main__":
    main()
