"""Kill small runs while they are at layers of statistics, surgery and refit, and go on with `--resume`.

    python experiments/faults/resume.py [--count 20] [--output reports/faults/resume.json]

Each method is killed at `--count` steps, spread over all of its own, every other time twice; a step is killed when all
its work is done but not kept. The next run must give the same bytes as one that nothing stops, do no finished step
again, and leave nothing.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
from fault_injection import place_for_faults, warm
from resuming import COMMANDS, Run
from tiny_checkpoints import saved_model, text_file

from layer_surgery.machine import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="Kills of each method.")
    parser.add_argument("--method", action="append", choices=COMMANDS, help="Only this one.")
    parser.add_argument("--output", type=Path, help="Write down here how much was tried.")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forks have no other threads
    tried: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    with tempfile.TemporaryDirectory(dir=place_for_faults()) as name:
        folder = Path(name)
        model, text = saved_model(folder / "model"), text_file(folder / "text.txt")
        warm(model, text)
        for method in options.method or COMMANDS:
            run = Run.begin(method, model, text, folder / method.replace(" ", "-"))
            count = min(options.count, len(run.steps))
            found = [
                problem
                for number in range(count)
                for problem in run.problems(number * len(run.steps) // count, number % 3 if number % 2 else None)
            ]
            tried[method] = {"steps": len(run.steps), "kills": count, "problems": len(found)}
            problems += found
            print(method, tried[method], *found, sep="\n", flush=True)
    record = {"tried": tried, "problems": problems, "provenance": provenance(torch.device("cpu"))}
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
