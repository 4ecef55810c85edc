"""Is perplexity right, and what does it cost? Against the model's own forward pass over the same windows.

    python experiments/evaluation/perplexity_cost.py [MODEL] --eval-data FILE

The yardstick is transformers' own loss, batch by batch, with the whole model in memory before the clock starts. Ours
counts everything from an opened checkpoint on, also the reading of the weights. In turns, in one process; medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, ROOT, write_report

from layer_surgery.config import EvaluationConfig, RuntimeConfig
from layer_surgery.evaluation.perplexity import summarise, window_losses
from layer_surgery.runs.session import open_session


def main() -> None:
    """Measure in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(DEMO_CHECKPOINT))
    parser.add_argument("--eval-data", default="bundled")
    parser.add_argument("--eval-windows", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "evaluation" / "perplexity_cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
    seconds: dict[str, list[float]] = {"forward": [], "perplexity": []}
    with open_session(arguments.model, RuntimeConfig(dtype="float32")) as session:
        config = EvaluationConfig(eval_data=arguments.eval_data, eval_windows=arguments.eval_windows)
        [tokens] = session.evaluation_tokens(config)
        predicted = int(tokens.loss_mask.sum())
        session.stream(session.checkpoint)  # the self-check of a model is part of every run, whatever is measured
        own = ours = 0.0
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            with torch.inference_mode():
                total = 0.0
                for rows in tokens.batches(session.runtime.batch_size):
                    ids, mask = tokens.token_ids[rows], tokens.loss_mask[rows]
                    loss = model(ids, labels=ids.masked_fill(~mask, -100), use_cache=False).loss
                    total += float(loss) * int(mask.sum())
            own = math.exp(total / predicted)
            seconds["forward"].append(time.perf_counter() - start)
            start = time.perf_counter()
            losses = window_losses(session.stream(session.checkpoint), tokens, session.settings)
            ours = summarise(losses, tokens).value
            seconds["perplexity"].append(time.perf_counter() - start)
            print({name: round(values[-1], 2) for name, values in seconds.items()}, own, ours, flush=True)
    ratios = [ours / own for own, ours in zip(seconds["forward"], seconds["perplexity"], strict=True)]
    results = {
        "checkpoint": Path(arguments.model).name,
        "data": {"name": Path(tokens.name).name, "sha256": tokens.sha256, "predicted_tokens": predicted},
        "perplexity": {"transformers": own, "layer_surgery": ours, "relative_difference": abs(ours / own - 1)},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "all": ratios},
    }
    write_report(arguments.report, results)


if __name__ == "__main__":
    main()
