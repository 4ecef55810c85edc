"""How much of a single layer's error a refit takes away, by the layer's depth: what the scorer's prior rests on.

    python experiments/task_aware/absorption.py MODEL --calibration books.txt --eval-data held-out.txt

Every layer but the first is operated on by itself, without and with a refit. The text must be development text: the
constant `ABSORBED` of `layer_surgery/scoring/fisher.py` was chosen by such a measurement.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from points import described, one_thread, points

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report


def main() -> None:
    """Measure every layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "task_aware" / "absorption.json")
    arguments = parser.parse_args()
    one_thread()
    rows: list[dict[str, Any]] = []
    with points(
        arguments.model,
        arguments.calibration,
        arguments.eval_data,
        samples=arguments.samples,
        windows=arguments.eval_windows,
    ) as run:
        depth = run.session.checkpoint.layer_count
        data = {Path(text.name).name: described(text) for text in [run.tokens, *run.texts]}
        for layer in range(1, depth):
            found = [run.measure([layer], "fisher", arguments.keep, refit=refit) for refit in (False, True)]
            rises = [[point["extra_loss"][text.name]["rise"] for text in run.texts] for point in found]
            row = {
                "layer": layer,
                "depth": layer / (depth - 1),
                "texts": [text.name for text in run.texts],
                "no_refit": rises[0],
                "refit": rises[1],
                "absorbed": [1 - after / before for before, after in zip(*rises, strict=True)],
                "predicted": found[0]["predicted_loss_rise"],
            }
            rows.append(row)
            print({name: row[name] for name in ("layer", "no_refit", "refit", "absorbed")}, flush=True)
            write_report(arguments.report, {"checkpoint": Path(arguments.model).name, "data": data, "rows": rows})


if __name__ == "__main__":
    main()
