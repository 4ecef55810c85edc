"""Run the commands in all environments that a run may find itself in at once, and in each of them.

    python experiments/faults/environments.py [--output reports/faults/environments.json]

Read-only HOME, no TMPDIR, 64 open files, LANG=C, and as root also: no network, another user. Each run must end with 0,
and without a warning or a traceback. A record that is there is gone on with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
from environments import ENVIRONMENTS, possible, start_in
from tiny_checkpoints import saved_model, text_file

from layer_surgery.machine import provenance

DATA = ["--eval-data", "text.txt", "--sequence-length", "16", "--eval-windows", "4"]
SURGERY = ["--calibration", "text.txt", "--samples", "4", "--output", "output", "--cache", "cache"]
COMMANDS = {
    "compress": ["compress", "model", "--target-layers", "3", "--keep", "0.3", "--method", "fisher", *DATA, *SURGERY],
    "evaluate": ["evaluate", "output", "--baseline", "model", *DATA],
    "heal": [
        *("heal", "output", "--data", "text.txt", "--tokens", "64", "--learning-rate", "1e-3", "--step-sequences", "2"),
        *(*DATA, "--general", "0", "--teacher-cache", "cache", "--output", "healed"),
    ],
    "verify": ["verify", "healed"],
    "export": ["export", "output", "--dense", "--output", "dense"],
    "report": ["report", "output"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", action="append", choices=COMMANDS, help="Only these, in their order.")
    parser.add_argument("--output", type=Path, help="Write down here what came of it.")
    options = parser.parse_args()
    tried: dict[str, dict[str, str]] = {}
    if options.output is not None and options.output.exists():
        tried = json.loads(options.output.read_text(encoding="utf-8"))["tried"]
    for name, chosen in {"all at once": possible(), **{name: [name] for name in possible()}}.items():
        if name in tried:
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            folder.chmod(0o755)
            saved_model(folder / "model")
            text_file(folder / "text.txt")
            tried[name] = {}
            for command in options.command or COMMANDS:
                if (folder / "home").exists():
                    shutil.rmtree(folder / "home")
                ended = start_in(chosen, COMMANDS[command], folder).run(folder)
                odd = [word for word in ("Traceback", "warning", "Warning") if word in ended.stderr]
                good = ended.returncode == 0 and not odd
                tried[name][command] = "works" if good else f"{ended.returncode}: {ended.stderr[-1500:]}"
        print(name, tried[name], flush=True)
        missing = [name for name in ENVIRONMENTS if name not in possible()]
        record = {"tried": tried, "not possible here": missing, "provenance": provenance(torch.device("cpu"))}
        if options.output is not None:
            options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(outcome != "works" for each in tried.values() for outcome in each.values()))


if __name__ == "__main__":
    main()
