"""Write lm-eval task configurations for BLiMP from a folder of its JSONL files, to be run offline.

    python experiments/blimp/make_tasks.py FOLDER OUTPUT
    layer-surgery evaluate smaller/ --baseline MODEL --tasks blimp_local --task-path OUTPUT

BLiMP (Warstadt et al., https://arxiv.org/abs/1912.00582) asks whether a model finds the acceptable sentence of a pair
more likely. Each file FOLDER/NAME.jsonl with `sentence_good` and `sentence_bad` becomes the task `blimp_local_NAME`,
and the group `blimp_local` holds all of them. Nothing is copied: the tasks point to the files in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

PREFIX = "blimp_local"
FIELDS = ("sentence_good", "sentence_bad")

COMMON = """\
output_type: multiple_choice
custom_dataset: !function pairs.load
test_split: test
doc_to_text: ""
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
doc_to_target: 0
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

LOADER = '''\
"""Reads the sentence pairs of one paradigm for lm-eval."""

import json
from pathlib import Path

from datasets import Dataset


def load(file, **_metadata):
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    keys = ("sentence_good", "sentence_bad")
    pairs = [json.loads(line) for line in lines if line.strip()]
    return {"test": Dataset.from_list([{key: pair[key] for key in keys} for pair in pairs])}
'''


def paradigms(folder: Path) -> list[Path]:
    """Return the JSONL files of a folder; `SystemExit` with one sentence if it is not such a folder."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise SystemExit(f"error: {folder} has no .jsonl files; give the folder of BLiMP's paradigms.")
    for path in files:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise SystemExit(f"error: {path} is empty.")
        for number, line in enumerate(lines, start=1):
            try:
                missing = [field for field in FIELDS if not isinstance(json.loads(line)[field], str)]
            except (ValueError, KeyError, TypeError):
                missing = list(FIELDS)
            if missing:
                raise SystemExit(f"error: {path}, line {number} is not a JSON object with {' and '.join(FIELDS)}.")
    return files


def write_tasks(folder: Path, output: Path) -> list[str]:
    """Write the configurations and return the names of the tasks."""
    files = paradigms(folder)
    output.mkdir(parents=True, exist_ok=True)
    (output / "_pairs.yaml").write_text(COMMON, encoding="utf-8")
    (output / "pairs.py").write_text(LOADER, encoding="utf-8")
    names = []
    for path in files:
        name = f"{PREFIX}_{path.stem}"
        names.append(name)
        where = json.dumps(str(path.resolve()))  # a JSON string is a YAML string too
        text = f"include: _pairs.yaml\ntask: {name}\ndataset_kwargs:\n  file: {where}\n"
        (output / f"{path.stem}.yaml").write_text(text, encoding="utf-8")
    members = "".join(f"  - {name}\n" for name in names)
    group = f"group: {PREFIX}\ntask:\n{members}aggregate_metric_list:\n  - metric: acc\n    aggregation: mean\n"
    (output / f"{PREFIX}.yaml").write_text(group + "    weight_by_size: true\n", encoding="utf-8")
    return names


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of BLiMP's JSONL files")
    parser.add_argument("output", type=Path, help="folder for the task configurations")
    options = parser.parse_args(arguments)
    names = write_tasks(options.folder, options.output)
    print(f"wrote {len(names)} tasks; run them with --tasks {PREFIX} --task-path {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
