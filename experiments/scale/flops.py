"""Floating-point operations of one layer by kind, in the exact way and in the one for wide matrices.

    python experiments/scale/flops.py

The tool's own functions run on random matrices of a sixteenth of each width, every operation of torch is counted by its
formula, and the counts, which are cubic in the widths, are scaled up. What is proportional to the tokens (passes,
moments, sums of the refit) follows from the sizes. `reports/scale/flops.json` and `flops.md` have the result.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import ROOT, write_report

from layer_surgery import devices
from layer_surgery.calibration.statistics import useful_rank
from layer_surgery.linalg import blockwise_nystrom, leading, least_squares
from layer_surgery.linalg.blockwise_nystrom import blockwise_column_order
from layer_surgery.linalg.leading import leading_whitened_svd
from layer_surgery.linalg.least_squares import RidgeProblem, Sums
from layer_surgery.linalg.low_rank import shrunk, whitened_svd
from layer_surgery.linalg.nystrom import column_order, narrowed

#: (hidden size, width of the MLP); queries, keys and values are as wide as the hidden size.
WIDTHS = ((1024, 2816), (4096, 11008), (8192, 28672))
TOKENS = 128 * 256
SCALE = 16
#: What does not grow with the widths, made smaller as they are.
CONSTANTS: tuple[tuple[Any, str], ...] = (
    (least_squares, "_PROBES"),
    (blockwise_nystrom, "_BLOCK"),
    (blockwise_nystrom, "_CANDIDATES"),
    (leading, "_LEAST_OVERSAMPLING"),
)

aten = torch.ops.aten
#: Kind of an operation and its operations, from its arguments (Golub & Van Loan, Matrix Computations; eigenvectors by
#: tridiagonal form and divide and conquer take 4 to 9 n^3, counted as 9).
FORMULAS: Mapping[Any, tuple[str, Callable[..., float]]] = {
    aten.mm.default: ("products", lambda a, b: 2 * a.shape[0] * a.shape[1] * b.shape[1]),
    aten.addmm.default: ("products", lambda _c, a, b: 2 * a.shape[0] * a.shape[1] * b.shape[1]),
    aten.addmm_.default: ("products", lambda _c, a, b: 2 * a.shape[0] * a.shape[1] * b.shape[1]),
    aten._linalg_eigh.default: ("eigendecompositions", lambda a, *_: 9 * a.shape[0] ** 3),
    aten.linalg_qr.default: ("QR", lambda a, *_: 4 * a.shape[0] * a.shape[1] ** 2 - 4 / 3 * a.shape[1] ** 3),
    aten.linalg_cholesky_ex.default: ("Cholesky", lambda a, *_: a.shape[0] ** 3 / 3),
    aten.cholesky_inverse.default: ("Cholesky", lambda a, *_: 2 / 3 * a.shape[0] ** 3),
    aten.linalg_solve_triangular.default: ("triangular solves", lambda a, b: a.shape[0] ** 2 * b.numel() / a.shape[0]),
    aten.cholesky_solve.default: ("triangular solves", lambda b, a, *_: 2 * a.shape[0] * b.numel()),
    aten._cholesky_solve_helper.default: ("triangular solves", lambda b, a, *_: 2 * a.shape[0] * b.numel()),
}


class Counting(TorchDispatchMode):
    """Counts operations by kind and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FORMULAS:
            kind, formula = FORMULAS[func]
            dtype = next(each.dtype for each in args if isinstance(each, Tensor))
            self.counts[f"{kind}, {str(dtype).removeprefix('torch.')}"] += int(formula(*args))
        return func(*args, **(kwargs or {}))


@dataclass
class Problem:
    """One linear with random moments and sums; made before anything is counted."""

    name: str
    weight: Tensor  # [out, in]
    inputs: Tensor  # [in, in] float64
    outputs: Tensor  # [out, out] float64
    sums: RidgeProblem


def problems(hidden: int, width: int) -> list[Problem]:
    """Return the linears of a layer; those that read the same input are behind each other."""
    sizes = dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden))
    sizes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return [
        Problem(name, torch.randn(out, in_) / in_**0.5, moment(in_), moment(out), random_sums(out, in_))
        for name, (out, in_) in sizes.items()
    ]


def moment(size: int) -> Tensor:
    """Return a damped second moment [size, size] float64."""
    rows = torch.randn(512, size)
    return shrunk((rows.T @ rows / len(rows)).double(), len(rows))


def random_sums(out: int, in_: int) -> RidgeProblem:
    """Return sums of tokens whose targets are linear in the inputs up to noise, so that a ridge is chosen."""
    true, parts = torch.randn(out, in_) / in_**0.5, []
    rows = min(3 * in_, 4096)
    for tokens in (rows, rows // 3):
        z, sums = torch.randn(tokens, in_), Sums.zeros(out, in_, torch.zeros(1))
        sums.add(z, z @ true.T + torch.randn(tokens, out))
        parts.append(sums)
    return RidgeProblem(*parts)


def statistics(layer: list[Problem], leading: bool) -> None:
    """Decompose every linear of a layer and rank channels and heads, as `calibration/collector.py` does."""
    for each in layer:
        weight, inputs, outputs = each.weight, each.inputs, each.outputs
        if leading:
            out, in_ = weight.shape
            leading_whitened_svd(weight, inputs, outputs, useful_rank((out, in_)))
        else:
            whitened_svd(weight, inputs, outputs)
        if each.name == "o":
            column_order(weight, inputs, outputs, len(inputs) // 32)
        if each.name == "down":
            (blockwise_column_order if leading else column_order)(weight, inputs, outputs)
            narrowed(weight, inputs, torch.arange(len(inputs) // 2))


def refit(layer: list[Problem], leading: bool) -> None:
    """Re-solve every linear of a layer, as `surgeon/refit.py` does."""
    owners = {"k": "q", "v": "q", "up": "gate"}
    by_name = {each.name: each.sums for each in layer}
    for each in layer:
        owner = by_name.get(owners.get(each.name, ""))
        solve = each.sums.solve_by_factors if leading else each.sums.solve
        solve(each.weight, owner)


def counted(work: Callable[[], None]) -> dict[str, int]:
    """Return the operations of some work at a fraction of the widths, scaled up."""
    with Counting() as mode:
        work()
    return {kind: count * SCALE**3 for kind, count in sorted(mode.counts.items())}


def of_tokens(hidden: int, width: int) -> dict[str, int]:
    """Return what is proportional to the tokens."""
    parameters = 4 * hidden**2 + 3 * hidden * width
    sides = [hidden] * 3 + [width] + [hidden] * 5 + [width] * 2  # read by, and at the outputs of, the linears
    products = 2 * parameters + sum(side**2 for side in sides[:4])
    return {
        # Forward, the forward pass again and back through it, without gradients of weights.
        "passes of the statistics": 6 * parameters * TOKENS,
        "moments, float32": sum(side**2 for side in sides) * TOKENS,  # half of each, by symmetry
        # Both models, for each of four groups of linears and once more behind the layer.
        "passes of the refit": 2 * 5 * 2 * parameters * TOKENS,
        "sums of the refit, float32": products * TOKENS,
    }


def widths(hidden: int, width: int) -> dict[str, Any]:
    """Return the table of one width."""
    torch.manual_seed(0)
    layer = problems(hidden // SCALE, width // SCALE)
    found: dict[str, Any] = {"hidden": hidden, "width": width, "of tokens": of_tokens(hidden, width)}
    with ExitStack() as smaller:
        for module, name in CONSTANTS:
            smaller.enter_context(mock.patch.object(module, name, max(1, getattr(module, name) // SCALE)))
        blocks = {kind: max(1, rows // SCALE) for kind, rows in devices._BLOCK_ROWS.items()}
        smaller.enter_context(mock.patch.dict(devices._BLOCK_ROWS, blocks))
        for way in ("exact", "leading"):
            for work in (statistics, refit):
                found[f"{work.__name__}, {way}"] = counted(partial(work, layer, way == "leading"))
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Return the tables in Markdown, in 10^12 operations."""
    lines = ["# Floating-point operations of one layer", ""]
    lines += [f"In 10^12, for {TOKENS:,} tokens where they are proportional to tokens; `experiments/scale/flops.py`."]
    for each in found:
        lines += [
            "",
            f"## Hidden {each['hidden']:,}, MLP {each['width']:,}",
            "",
            "| | exact | leading |",
            "|---|--:|--:|",
        ]
        lines += [f"| {name} | {count / 1e12:.2f} | {count / 1e12:.2f} |" for name, count in each["of tokens"].items()]
        for work in ("statistics", "refit"):
            ways = [each[f"{work}, {way}"] for way in ("exact", "leading")]
            for kind in sorted({*ways[0], *ways[1]}):
                cells = " | ".join(f"{way.get(kind, 0) / 1e12:.2f}" for way in ways)
                lines.append(f"| {work}: {kind} | {cells} |")
            total = " | ".join(f"**{sum(way.values()) / 1e12:.2f}**" for way in ways)
            lines.append(f"| **{work}: all decompositions** | {total} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "scale" / "flops.json")
    arguments = parser.parse_args()
    found = [widths(hidden, width) for hidden, width in WIDTHS]
    write_report(arguments.report, {"tokens": TOKENS, "scale": SCALE, "widths": found})
    arguments.report.with_suffix(".md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
