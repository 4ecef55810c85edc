"""What a step of healing costs, in time and peak memory, against a plain Trainer on cross-entropy.

    python experiments/healing/cost.py MODEL --data train.txt [--target-layers 9] [--steps 12] [--rounds 5]

The model is compressed by the default method, and the result is trained for some steps in each way (`WAYS`), each time
in a process of its own, in turns: a round has every way once. `plain` is transformers' Trainer with the model's own
loss, on the same windows, with the same arguments; the others are healing as `layer-surgery heal` does it, the original
asked before (in the same process, as its memory counts). Time is from the end of a step to the end of the next,
validation and files not included; of each process the median counts, and the ratio is that of the medians over rounds.
Peak memory is what the kernel reports of the process, and how far that is above what it was before any model was
loaded; on CUDA it is that of the allocator. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report
from transformers import Trainer, TrainerCallback

import layer_surgery
from layer_surgery.config import HealConfig
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.devices import peak_device_memory_bytes, peak_memory_bytes
from layer_surgery.healing.pairs import layer_pairs
from layer_surgery.healing.student import Student
from layer_surgery.healing.trainable import trained_names
from layer_surgery.healing.training import TrainingSettings, train, training_arguments
from layer_surgery.healing.windows import HealingData, WindowDataset, passes
from layer_surgery.records.reading import read_report
from layer_surgery.runs.healing.asking import Asking
from layer_surgery.runs.healing.prepare import prepare_healing
from layer_surgery.runs.provenance import checkpoint_hash
from layer_surgery.runs.session import Session, open_session
from layer_surgery.walk.streamed import StreamedModel

#: Ways of training by name; the losses of healing, or none for a plain Trainer.
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "healing, ce": ("ce",),
    "healing, kl": ("kl",),
    "healing, kl + hidden": ("kl:1", "hidden:0.1"),
}
#: The aims: a step with cached outputs of the original, and the peak, against `plain`.
AIMS = {"seconds": 1.6, "peak": 1.15}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--name", help="of the checkpoint in the report (default: the last part of its path)")
    parser.add_argument("--data", action="append", help="calibration and training (default: the bundled text)")
    parser.add_argument("--target-layers", type=int, default=9)
    parser.add_argument("--samples", type=int, default=64, help="to calibrate on")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--step-sequences", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12, help="in each process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="default: reports/healing/cost-NAME.json")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "RESULT"), help=argparse.SUPPRESS)  # what a process does
    return parser.parse_args()


def main() -> None:
    """Measure one way in this process, or all in processes of their own."""
    arguments = options()
    arguments.data = arguments.data or ["bundled"]
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measured(arguments, *arguments.one)))
        return
    parts = [part for part in Path(arguments.model).resolve().parts if part != "checkpoint"]
    name = arguments.name or parts[-1]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result"
        layer_surgery.compress(
            arguments.model,
            result,
            target_layers=arguments.target_layers,
            keep=0.2,
            calibration=arguments.data,
            samples=arguments.samples,
            sequence_length=arguments.sequence_length,
            eval_data=None,
            seed=arguments.seed,
        )
        for number in range(arguments.rounds):
            for way in arguments.ways:
                command = [sys.executable, *sys.argv, "--one", way, str(result)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{way}: {done.stderr[-3000:]}")
                rows.append({"round": number, "way": way} | json.loads(done.stdout.splitlines()[-1]))
                print(number, way, rows[-1], flush=True)
    settings = (
        *("target_layers", "samples", "sequence_length", "step_sequences", "batch_size"),
        *("steps", "rounds", "threads", "device", "seed"),
    )
    identity = {"checkpoint": name, "data": [Path(text).name for text in arguments.data]}
    identity |= {option: getattr(arguments, option) for option in settings}
    path = arguments.report or ROOT / "reports" / "healing" / f"cost-{name}.json"
    write_report(path, {"identity": identity, "aims": AIMS, "ratios": ratios(rows), "rows": rows}, arguments.device)


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, of every way, the medians over rounds and what they are of those of `plain`."""
    quantities = ("seconds", "peak_bytes", "peak_above_start_bytes")

    def median(way: str, quantity: str) -> float:
        return statistics.median(row[quantity] for row in rows if row["way"] == way)

    ways = list(dict.fromkeys(row["way"] for row in rows))
    return {
        way: {
            quantity: {"median": median(way, quantity), "of plain": median(way, quantity) / median("plain", quantity)}
            for quantity in (quantities if "plain" in ways else ())
        }
        for way in ways
    }


def measured(arguments: argparse.Namespace, way: str, result: str) -> dict[str, Any]:
    """Train in one way; return the median seconds of a step, the peak memory, and hashes of the data."""
    config = HealConfig(
        no_save=True,
        data=arguments.data,
        loss=WAYS[way] or ("ce",),
        tokens=arguments.steps * arguments.step_sequences * arguments.sequence_length,
        sequence_length=arguments.sequence_length,
        step_sequences=arguments.step_sequences,
        batch_size=arguments.batch_size,
        device=arguments.device,
        seed=arguments.seed,
        eval_data=(),
    )
    before = peak_memory_bytes()
    ends: list[float] = []
    with ExitStack() as stack:
        session = stack.enter_context(open_session(result, config))
        prepared = prepare_healing(session, config, config)
        data = prepared.data.first(arguments.steps * arguments.step_sequences)
        settings = TrainingSettings(
            steps=arguments.steps,
            learning_rate=1e-4,
            step_sequences=arguments.step_sequences,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            directory=session.new_scratch("training"),
            device=session.device,
            dtype=session.dtype,
            validations=1,
        )
        if WAYS[way]:
            teacher = stack.enter_context(open_session(arguments.model, config))
            plan = read_report(Path(result) / "surgery.json").plan
            pairs = layer_pairs(plan.surviving, len(plan.layers))
            streamed = StreamedModel(session.checkpoint, device=session.device, dtype=session.dtype, resident_bytes=0)
            student = Student(streamed, prepared.losses, pairs=pairs)
            student.unfreeze(trained_names(session.checkpoint, plan, "all"))
            Asking(session, teacher, checkpoint_hash(teacher), prepared, pairs, stack).ask(student, data)
            short = replace(data, validation=data.validation.select(slice(0, 2)), watched=None)
            train(
                student,
                short,
                settings,
                unhealed={"validation": math.inf},
                advance=lambda: ends.append(time.perf_counter()),
            )
        else:
            train_plainly(session, result, data, settings, ends)
        device_peak = peak_device_memory_bytes(session.device)
    seconds = [end - begin for begin, end in pairwise(ends)]
    peak = device_peak or peak_memory_bytes()
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": peak,
        "peak_above_start_bytes": peak - (0 if device_peak else before),
        "data_sha256": data.train.sha256,
    }


def train_plainly(
    session: Session, result: str, data: HealingData, settings: TrainingSettings, ends: list[float]
) -> None:
    """Train all weights of the result on cross-entropy by transformers alone, and note when each step ends."""
    model: Any = layer_surgery.load(result).to(settings.device, torch.float32)
    order = passes(data.order, settings.steps * settings.step_sequences, settings.seed)
    windows = WindowDataset(data.train, order)

    def collate(numbers: Any) -> dict[str, Any]:
        rows = torch.tensor(list(numbers))
        labels = data.train.token_ids[rows].masked_fill(~data.train.loss_mask[rows], NO_LABEL)
        return {"input_ids": data.train.token_ids[rows], "labels": labels}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    own = training_arguments(settings)
    own.eval_strategy = own.save_strategy = own.logging_strategy = "no"
    Trainer(model=model, args=own, train_dataset=windows, data_collator=collate, callbacks=[Watch()]).train()


if __name__ == "__main__":
    main()
