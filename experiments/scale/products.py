"""Rate and error of float32 products by the library that torch takes and by the one that `devices.py` takes here.

    python experiments/scale/products.py

On one thread, CPU time of the process, the two in turn; the error is relative, in the Frobenius norm, to float64.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, write_report

from layer_surgery.devices import fast_products

#: Tokens, inputs and outputs of linears: of the demo, and of wider models.
SIZES = ((2048, 256, 704), (2048, 704, 256), (512, 4096, 1024), (2048, 2048, 2048), (2048, 4096, 4096))
LIBRARIES = {"torch's default": nullcontext, "devices.py's": lambda: fast_products(torch.device("cpu"))}


def measured(tokens: int, in_: int, out: int, repeats: int) -> dict[str, Any]:
    """Return GFLOP/s and relative error of both, for a linear and for a sum over tokens."""
    x, w, g = torch.randn(tokens, in_), torch.randn(out, in_), torch.randn(tokens, out)
    found: dict[str, Any] = {"tokens": tokens, "in": in_, "out": out}
    for kind, left, right in (("linear", x, w.T), ("sum over tokens", g.T, x)):
        exact = left.double() @ right.double()
        best: dict[str, float] = {}
        for _ in range(repeats + 1):
            for name, library in LIBRARIES.items():
                with library():
                    start = time.process_time()
                    product = left @ right
                    seconds = time.process_time() - start
                best[name] = min(best.get(name, seconds), seconds)
                error = float((product - exact).norm() / exact.norm())
                rate = 2 * tokens * in_ * out / best[name] / 1e9
                found[f"{kind}, {name}"] = {"gflops": round(rate, 1), "error": float(f"{error:.2e}")}
    return found


def main() -> None:
    """Measure all sizes and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "scale" / "products.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measured(*size, arguments.repeats) for size in SIZES]
    for row in rows:
        print(row, flush=True)
    write_report(arguments.report, {"repeats": arguments.repeats, "rows": rows})


if __name__ == "__main__":
    main()
