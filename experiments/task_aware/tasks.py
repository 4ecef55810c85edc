"""Task-awareness: does calibrating on a task keep that task better than generic text does?

    python experiments/task_aware/tasks.py --generic books.txt --domain other.txt --domain-eval other-held-out.txt \
        --blimp FOLDER --eval-data held-out.txt

Three tasks of different kind. BLiMP: calibrated on grammatical sentences of every second paradigm, measured on the
other paradigms. Choices: the three bundled tasks that have a context, as prompts and answers, loss on answers only,
calibrated on half of their items and measured on the other half. A domain of text. For each kind of calibration data
the same layers, budget and method, with and without refit (whose general text is left out, so that only the calibration
data differ).

Accuracy on so few items is coarse, so three things are measured of each task: accuracy; the loss of the right answer's
tokens; and the log loss of the choice, -log p(right) where p is over the choices, in proportion to their likelihoods.
Rises of the losses over the original's are paired by item.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from points import described, evaluate, one_thread, paired, points

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.config import BudgetConfig
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.runs.session import Session
from layer_surgery.surgeon import make_plan, model_shape
from layer_surgery.walk.walk import Walk

Item = tuple[str, list[str], int]  # context, choices, which is right


def blimp_items(folder: Path, *, odd: bool, each: int) -> list[Item]:
    """Return minimal pairs of every second paradigm (of the odd ones, or of the others)."""
    items: list[Item] = []
    for path in sorted(folder.glob("*.jsonl"))[int(odd) :: 2]:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:each]
        items += [("", [line["sentence_good"], line["sentence_bad"]], 0) for line in lines]
    return items


def bundled_items(path: Path) -> list[Item]:
    """Return the items of a bundled task."""
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


@dataclass(frozen=True)
class Outcome:
    """What a model makes of each item."""

    right: torch.Tensor  # [items] 1.0 or 0.0
    answer: torch.Tensor  # [items] loss of the right answer, nats
    tokens: torch.Tensor  # [items] tokens of the right answer that carry loss
    choice: torch.Tensor  # [items] log loss of the choice, nats

    def summary(self, dense: Outcome | None) -> dict[str, float]:
        """Return means, and how much they rose over the original's."""
        found = {
            "accuracy": float(self.right.mean()),
            "answer_loss": float(self.answer.sum() / self.tokens.sum()),
            "choice_loss": float(self.choice.mean()),
            "items": len(self.right),
        }
        if dense is not None:
            per_token = (self.answer - dense.answer) / dense.tokens.mean()
            rises = {"accuracy": self.right - dense.right, "answer_loss": per_token}
            for name, rise in (rises | {"choice_loss": self.choice - dense.choice}).items():
                found[f"{name}_rise"] = float(rise.mean())
                found[f"{name}_rise_stderr"] = float(rise.std() / math.sqrt(len(rise)))
        return found


def outcome(session: Session, checkpoint: Checkpoint, items: Sequence[Item]) -> Outcome:
    """Run all choices of all items through a model."""
    model, tokens = session.stream(checkpoint), packed(session, items)
    with Walk(model, tokens, session.settings) as walk:
        losses = walk.losses(walk.forward(list(range(model.layer_count)), keep=False))
    right, answers, counts, choices = [], [], [], []
    position = 0
    for _context, options, answer in items:
        sums = losses.sums[position : position + len(options)].double()
        right.append(float(int(sums.argmin()) == answer))
        answers.append(float(sums[answer]))
        counts.append(float(losses.tokens[position + answer]))
        choices.append(float(-torch.log_softmax(-sums, dim=0)[answer]))
        position += len(options)
    return Outcome(*(torch.tensor(values, dtype=torch.float64) for values in (right, answers, counts, choices)))


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
    folder = ROOT / "calibration_data" / "tasks"
    found = [item for path in sorted(folder.glob("*.jsonl")) for item in bundled_items(path)]
    choices = [item for item in found if item[0]]  # a prompt must not be empty
    with tempfile.TemporaryDirectory() as directory:
        blimp_text, choices_file = Path(directory) / "blimp.txt", Path(directory) / "choices.jsonl"
        sentences = [options[0] for _context, options, _answer in blimp_items(arguments.blimp, odd=False, each=200)]
        order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
        blimp_text.write_text("\n".join(sentences[i] for i in order), encoding="utf-8")
        examples = [{"prompt": context, "answer": options[answer]} for context, options, answer in choices[0::2]]
        choices_file.write_text("".join(json.dumps(e) + "\n" for e in examples), encoding="utf-8")
        few = 10  # what the items fill
        kinds: dict[str, tuple[list[str], int]] = {
            "generic text": ([arguments.generic], arguments.samples),
            "BLiMP": ([str(blimp_text)], arguments.samples),
            "generic + BLiMP": ([arguments.generic, str(blimp_text)], arguments.samples),
            "choices": ([str(choices_file)], few),
            "generic + choices": ([f"{arguments.generic}:5", f"{choices_file}:1"], 6 * few),
            "domain": ([arguments.domain], arguments.samples),
            "generic + domain": ([arguments.generic, arguments.domain], arguments.samples),
        }
        measured = {
            "BLiMP, other paradigms": blimp_items(arguments.blimp, odd=True, each=60),
            "choices, other items": choices[1::2],
        }
        dense: dict[str, Outcome] = {}
        for seed in arguments.seeds:
            layers: list[int] = []
            for kind, (sources, samples) in kinds.items():
                with points(
                    arguments.model,
                    sources,
                    [arguments.eval_data, arguments.domain_eval],
                    seed=seed,
                    samples=samples,
                    windows=arguments.eval_windows,
                ) as run:
                    session = run.session
                    if not rows:
                        dense = {name: outcome(session, session.checkpoint, items) for name, items in measured.items()}
                        rows.append(
                            {"calibration": "(dense)", "tasks": {name: dense[name].summary(None) for name in dense}}
                        )
                        data |= {text.name: described(text) for text in run.texts}
                        print("dense", rows[0]["tasks"], flush=True)
                    gone = session.checkpoint.layer_count - arguments.target_layers
                    # The same layers for all, so that only what is kept of them differs.
                    layers = layers or run.order("fisher", gone, 0.1, refit=True)
                    plan = make_plan(
                        model_shape(session.checkpoint), layers, BudgetConfig(keep=arguments.keep), "fisher"
                    )
                    for refit in (False, True):
                        done = run.bench.operate(plan, "fisher", "all" if refit else None)
                        losses = evaluate(session, done.checkpoint, run.texts)
                        row = {
                            "calibration": kind,
                            "seed": seed,
                            "refit": refit,
                            "layers": sorted(layers),
                            "parameters": done.checkpoint.parameters,
                            "extra_loss": {name: paired(losses[name], run.dense[name]) for name in losses},
                            "tasks": {
                                name: outcome(session, done.checkpoint, items).summary(dense[name])
                                for name, items in measured.items()
                            },
                        }
                        rows.append(row)
                        shown = {name: round(v["rise"], 4) for name, v in row["extra_loss"].items()}
                        shown |= {
                            f"{name}: {key}": round(v[key], 3)
                            for name, v in row["tasks"].items()
                            for key in ("accuracy", "answer_loss_rise", "choice_loss_rise")
                        }
                        print(seed, kind, "refit" if refit else "", shown, flush=True)
                        write_report(arguments.report, {"checkpoint": arguments.model, "data": data, "rows": rows})


if __name__ == "__main__":
    main()
