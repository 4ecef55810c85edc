"""Stop small runs at every event of the file system, by every signal and error, and check what is there then.

    python experiments/faults/every_fault.py [--scenario NAME]... [--fault NAME]... [--output FILE]

It takes an hour or so, and prints what does not hold and how much was tried. `tests/faults/` tries a sample.
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
from fault_injection import FAULTS, Trial, place_for_faults, scenarios
from tiny_checkpoints import saved_model, text_file

import layer_surgery
import layer_surgery.reporting.card
import layer_surgery.reporting.compare
import layer_surgery.reporting.page
from layer_surgery.machine import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", action="append", help="Only this one.")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="Only this one.")
    parser.add_argument("--output", type=Path, help="Write down here how much was tried.")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forks have no other threads
    problems: list[str] = []
    tried: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(dir=place_for_faults()) as name:
        folder = Path(name)
        model, text = saved_model(folder / "model"), text_file(folder / "text.txt")
        layer_surgery.compress(model, folder / "low-rank", layers=[1], keep=0.3, method="svd", eval_data=None)
        for scenario in scenarios(model, folder / "low-rank", text):
            if options.scenario and scenario.name not in options.scenario:
                continue
            trial = Trial.begin(scenario, folder / scenario.name)
            tried[scenario.name] = {"events": len(trial.events), "faults": 0, "problems": 0}
            for fault in options.fault or FAULTS:
                for at in range(len(trial.events)):
                    found = list(trial.problems(fault, at))
                    tried[scenario.name]["faults"] += 1
                    tried[scenario.name]["problems"] += bool(found)
                    problems += found
                    for problem in found:
                        print(problem, flush=True)
            print(scenario.name, tried[scenario.name], flush=True)
    record = {"faults": list(options.fault or FAULTS), "tried": tried, "provenance": provenance(torch.device("cpu"))}
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
