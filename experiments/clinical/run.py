"""Extraction from SYNTHETIC clinical notes, from no labels to a small tagger, offline, in one command.

    python experiments/clinical/run.py OUT
    python experiments/clinical/run.py OUT --quick --seed 1

Notes with gold spans are generated. A causal LM under a JSON grammar, a lexicon and rules label those for training; the
best union of them is chosen on a few gold notes. A tagger is trained on its labels, made smaller by `compress` with the
task's loss, and compared with a tagger trained on gold, on notes like those and on others with held-out templates and
terms. The causal LM is compressed too, with the loss of its answers. After "Clinical information extraction by
distillation" (arXiv 2501.00031), whose corpora are gated; nothing here comes from a record of a patient.

OUT gets every checkpoint, label and score; a run that was stopped goes on there. The results are `results.json` and
`results.md`, in OUT or in `--report`. It takes xgrammar and seqeval beside the package:
`pip install 'xgrammar>=0.2.8' seqeval`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import DEMO_CHECKPOINT, write_report
from extraction.page import page
from extraction.results import results
from extraction.sizes import DEFAULT, QUICK
from extraction.stages import Recipe
from extraction.tags import LabelError

from layer_surgery.errors import LayerSurgeryError, UserError

EXTRA = ("xgrammar", "seqeval")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="in miniature: every stage, and scores that mean nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llm", type=Path, default=DEMO_CHECKPOINT, help="causal LM (default: the demo's checkpoint)")
    parser.add_argument("--report", type=Path, help="folder for the results (default: OUT)")
    parser.add_argument(
        "--price-per-hour", type=float, default=0.05, help="of one core, in any currency (default: 0.05)"
    )
    parser.add_argument(
        "--no-causal", action="store_true", help="do not compress the causal LM, which takes about half of the time"
    )
    return parser.parse_args()


def main() -> int:
    """Run the recipe, and write what it came to."""
    given = options()
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"{' and '.join(missing)} cannot be imported; run: pip install {' '.join(missing)}")
    if given.price_per_hour <= 0:
        return _refuse(f"--price-per-hour is {given.price_per_hour}; allowed: more than 0.")
    if not (given.llm / "config.json").is_file():
        return _refuse(f"--llm {given.llm} is not the directory of a checkpoint; give one with config.json.")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    size = QUICK if given.quick else DEFAULT
    settings = {"size": asdict(size), "seed": given.seed, "llm": given.llm.resolve().name}
    begun = given.output / "settings.json"
    if begun.exists():
        if json.loads(begun.read_text(encoding="utf-8")) != settings:
            return _refuse(f"{given.output} holds a run with other settings; give another folder, or remove it.")
    elif given.output.exists() and any(given.output.iterdir()):
        return _refuse(f"{given.output} holds other files; give a folder that is new or empty.")
    given.output.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(settings), encoding="utf-8")
    try:
        found = results(
            Recipe(given.output, size, given.seed, given.llm), given.price_per_hour, causal=not given.no_causal
        )
    except (UserError, LabelError) as error:
        return _refuse(str(error))
    except LayerSurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    folder = given.report or given.output
    write_report(folder / "results.json", found)
    (folder / "results.md").write_text(page(found), encoding="utf-8")
    return 0


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
