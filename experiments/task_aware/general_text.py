"""Does general text among the calibration text help far from it, beyond its share in the refit?

    python experiments/task_aware/general_text.py --calibration books.txt --eval-data held-out.txt --eval-data far.txt

The refit replays general text (`--general`, a quarter by default); the moments that the search goes by are of the
calibration text alone. Here bundled general text is added to the calibration text, so that it is in both: the tokens of
the calibration text stay the same, so more is looked at, not other things. Both checkpoints that the project ships.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

import layer_surgery

CHECKPOINTS = {"demo": DEMO_CHECKPOINT, "second": ROOT / "experiments" / "second_checkpoint" / "checkpoint"}
#: Parts of general text for each part of the calibration text.
SHARES = (0.0, 1 / 8, 1 / 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=48, help="of each text")
    parser.add_argument("--samples", type=int, default=128, help="sequences of the calibration text")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.82, 0.65])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        {"checkpoint": name, "size": size, "general": share, "extra_loss": measured(path, size, share, arguments)}
        for name, path in CHECKPOINTS.items()
        for size in arguments.sizes
        for share in SHARES
    ]
    write_report(ROOT / "reports" / "task_aware" / "general_text.json", {"rows": rows})


def measured(checkpoint: Path, size: float, share: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the extra loss on each text of a result that was calibrated with a share of general text."""
    books, general = arguments.samples, round(arguments.samples * share)
    with tempfile.TemporaryDirectory() as folder:
        report = layer_surgery.compress(
            checkpoint,
            Path(folder) / "result",
            calibration=[f"{arguments.calibration}:{books}", *([f"bundled:{general}"] if general else [])],
            samples=books + general,
            target_parameters=size,
            eval_data=arguments.eval_data,
            eval_windows=arguments.eval_windows,
            distance=False,
            continuations=0,
        )
    found = {Path(text).name: asdict(c.loss_difference) for text, c in report.comparison.perplexity.items()}
    print(
        checkpoint.parent.name,
        size,
        share,
        {text: round(value["value"], 4) for text, value in found.items()},
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
