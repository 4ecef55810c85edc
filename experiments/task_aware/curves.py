"""Quality against parameters: every method at every budget, at one number of whole layers.

python experiments/task_aware/curves.py --calibration books.txt --eval-data held-out.txt --eval-data other.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from points import described, one_thread, points

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

#: (method, refit, layers by block influence)
CURVES = [
    ("svd", False, True),
    ("grasp", False, True),
    ("svd_llm", False, True),
    ("fisher", False, False),
    ("fisher", True, False),
]


def main() -> None:
    """Measure all points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--eval-data", action="append", required=True)
    parser.add_argument("--eval-windows", type=int, default=48)
    parser.add_argument("--target-layers", type=int, default=9)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05, 0.1, 0.3, 0.5])
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "task_aware" / "curves.json")
    arguments = parser.parse_args()
    one_thread()
    found = json.loads(arguments.report.read_text()) if arguments.report.exists() else {}
    rows: list[dict[str, Any]] = found.get("rows", [])
    known = {(row["method"], row["refit"], row["published_layers"], row["keep"]) for row in rows}
    with points(arguments.model, arguments.calibration, arguments.eval_data, windows=arguments.eval_windows) as run:
        gone = run.session.checkpoint.layer_count - arguments.target_layers
        published = run.order("block_influence", gone, 0.1, refit=False)
        data = {Path(text.name).name: described(text) for text in [run.tokens, *run.texts]}
        for keep in arguments.keep:
            for method, refit, by_influence in CURVES:
                if (method, refit, by_influence, keep) in known:
                    continue
                layers = published if by_influence else run.order("fisher", gone, keep, refit=refit)
                row = run.measure(layers, method, keep, refit=refit) | {"published_layers": by_influence}
                rows.append(row)
                rises = {name: round(value["rise"], 4) for name, value in row["extra_loss"].items()}
                print(keep, method, refit, row["layers"], rises, flush=True)
                write_report(arguments.report, {"checkpoint": arguments.model, "data": data, "rows": rows})


if __name__ == "__main__":
    main()
