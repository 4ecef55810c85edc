"""Task-awareness: does calibrating on a task keep that task better than generic text does?

    python experiments/task_aware/tasks.py --generic books.txt --domain other.txt --domain-eval other-held-out.txt \
        --blimp FOLDER --eval-data held-out.txt

Three tasks of different kind. BLiMP: calibrated on grammatical sentences of every second paradigm, measured on the
other paradigms. Copying: the bundled task as prompt and answer, loss on answers only, calibrated on half of its items
and measured on the other half. A domain of text. For each kind of calibration data the same layers, budget and method,
with and without refit (whose general text is left out, so that only the calibration data differ).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from points import bench, described, evaluate, one_thread, paired

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.checkpoint import Checkpoint
from layer_surgery.config import BudgetConfig
from layer_surgery.operation import operate, refit_data
from layer_surgery.session import Session
from layer_surgery.surgeon import METHODS, make_plan, model_shape
from layer_surgery.tokens import PackedTokens
from layer_surgery.walk import Walk

Item = tuple[str, list[str], int]  # context, choices, which is right


def blimp_items(folder: Path, *, odd: bool, each: int) -> list[Item]:
    """Return minimal pairs of every second paradigm (of the odd ones, or of the others)."""
    items: list[Item] = []
    for path in sorted(folder.glob("*.jsonl"))[int(odd) :: 2]:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:each]
        items += [("", [line["sentence_good"], line["sentence_bad"]], 0) for line in lines]
    return items


def bundled_items(name: str) -> list[Item]:
    """Return the items of a bundled task."""
    path = ROOT / "calibration_data" / "tasks" / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["context"], line["choices"], line["answer"]) for line in lines]


def packed(session: Session, items: Sequence[Item]) -> PackedTokens:
    """Return one row per choice, with loss on the choice."""
    tokenizer = session.need_tokenizer()
    rows: list[tuple[list[int], int]] = []
    for context, choices, _answer in items:
        head = tokenizer(context, add_special_tokens=False)["input_ids"] if context else []
        for choice in choices:
            text = f"{context} {choice}" if context else choice
            rows.append((tokenizer(text, add_special_tokens=False)["input_ids"], len(head)))
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (tokens, start) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        valid[row, : len(tokens)] = True
        mask[row, max(1, start) : len(tokens)] = True
    return PackedTokens(name="items", token_ids=ids, loss_mask=mask, valid=valid, tokens_available=0, sha256="")


def accuracy(session: Session, checkpoint: Checkpoint, items: Sequence[Item]) -> dict[str, float]:
    """Return the share of items whose right choice is likeliest, with its standard error."""
    model, tokens = session.stream(checkpoint), packed(session, items)
    with Walk(model, tokens, session.settings) as walk:
        sums = walk.losses(walk.forward(list(range(model.layer_count)), keep=False)).sums.tolist()
    right, position = 0, 0
    for _context, choices, answer in items:
        losses = sums[position : position + len(choices)]
        right += losses.index(min(losses)) == answer
        position += len(choices)
    share = right / len(items)
    return {"value": share, "stderr": math.sqrt(share * (1 - share) / len(items)), "items": len(items)}


def main() -> None:
    """Measure every calibration on every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--generic", required=True)
    parser.add_argument("--domain", required=True)
    parser.add_argument("--domain-eval", required=True)
    parser.add_argument("--blimp", type=Path, required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--eval-windows", type=int, default=48)
    parser.add_argument("--target-layers", type=int, default=8)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "task_aware" / "tasks.json")
    arguments = parser.parse_args()
    one_thread()
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {}
    copying = bundled_items("copying")
    with tempfile.TemporaryDirectory() as directory:
        blimp_text, copying_file = Path(directory) / "blimp.txt", Path(directory) / "copying.jsonl"
        sentences = [choices[0] for _c, choices, _a in blimp_items(arguments.blimp, odd=False, each=200)]
        order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
        blimp_text.write_text("\n".join(sentences[i] for i in order), encoding="utf-8")
        examples = [{"prompt": context, "answer": choices[answer]} for context, choices, answer in copying[0::2]]
        copying_file.write_text("".join(json.dumps(e) + "\n" for e in examples), encoding="utf-8")
        kinds = {
            "generic text": [arguments.generic],
            "BLiMP": [str(blimp_text)],
            "generic + BLiMP": [arguments.generic, str(blimp_text)],
            "generic + copying": [f"{arguments.generic}:15", f"{copying_file}:1"],
            "domain": [arguments.domain],
            "generic + domain": [arguments.generic, arguments.domain],
        }
        measured = {
            "BLiMP, other paradigms": blimp_items(arguments.blimp, odd=True, each=60),
            "copying, other items": copying[1::2],
        }
        for seed in arguments.seeds:
            layers: list[int] = []
            for kind, sources in kinds.items():
                with bench(
                    arguments.model,
                    sources,
                    [arguments.eval_data, arguments.domain_eval],
                    seed=seed,
                    samples=arguments.samples,
                    windows=arguments.eval_windows,
                ) as run:
                    session = run.session
                    if not rows:
                        dense = {name: accuracy(session, session.checkpoint, items) for name, items in measured.items()}
                        rows.append({"calibration": "(dense)", "accuracy": dense})
                        data |= {text.name: described(text) for text in run.texts}
                        print("dense", {name: round(value["value"], 3) for name, value in dense.items()}, flush=True)
                    gone = session.checkpoint.layer_count - arguments.target_layers
                    # The same layers for all, so that only what is kept of them differs.
                    layers = layers or run.order("fisher", gone, 0.1, refit=True)
                    plan = make_plan(
                        model_shape(session.checkpoint), layers, BudgetConfig(keep=arguments.keep), "fisher"
                    )
                    for refit in (False, True):
                        looked_at = refit_data(session, run.tokens, "all", 0.0) if refit else None
                        done = operate(session, run.walk, plan, METHODS["fisher"], run.statistics, refit_data=looked_at)
                        losses = evaluate(session, done.checkpoint, run.texts)
                        row = {
                            "calibration": kind,
                            "seed": seed,
                            "refit": refit,
                            "layers": sorted(layers),
                            "parameters": done.checkpoint.parameters,
                            "extra_loss": {name: paired(losses[name], run.dense[name]) for name in losses},
                            "accuracy": {
                                name: accuracy(session, done.checkpoint, items) for name, items in measured.items()
                            },
                        }
                        rows.append(row)
                        shown = {name: round(v["rise"], 4) for name, v in row["extra_loss"].items()}
                        shown |= {name: round(v["value"], 3) for name, v in row["accuracy"].items()}
                        print(seed, kind, "refit" if refit else "", shown, flush=True)
                        write_report(arguments.report, {"checkpoint": arguments.model, "data": data, "rows": rows})


if __name__ == "__main__":
    main()
