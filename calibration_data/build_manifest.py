"""Write calibration_data/MANIFEST.json, or check that it is up to date.

    python calibration_data/build_manifest.py TOKENIZER_DIR    write the manifest
    python calibration_data/build_manifest.py --check          exit 1 if a rule is broken or the manifest is out of date

The tokenizer is needed only to count tokens. Without it, counts are taken from the present manifest for files that
have not changed. Rules: no document, and no long paragraph, stands in both parts; at least 40,000 words; calibration
has 75 to 85 % of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
PARTS = ("calibration", "evaluation")
MINIMUM_WORDS = 40_000
CALIBRATION_SHARE = (0.75, 0.85)
LONG_PARAGRAPH = 20  # words

CountTokens = Callable[[str], int]


def build(directory: Path, tokenizer: Path | None, present: dict[str, Any] | None) -> dict[str, Any]:
    """Return the manifest of the texts in `directory`; `present` is the manifest that stands there now."""
    known = {
        document["sha256"]: document["tokens"]
        for part in (present or {}).get("parts", {}).values()
        for document in part["documents"]
    }
    count = _counter(tokenizer) if tokenizer else None
    identity = _identity(tokenizer) if tokenizer else (present or {}).get("tokenizer")
    parts = {part: _part(directory / part, count, known) for part in PARTS}
    return {
        "schema_version": SCHEMA_VERSION,
        "licence": "Apache-2.0",
        "source": "text written for this project",
        "tokenizer": identity,
        "parts": parts,
        "tasks": _files(directory / "tasks"),
        "retrieval": _files(directory / "retrieval"),
        "totals": _totals(list(parts.values())),
    }


def _part(directory: Path, count: CountTokens | None, known: dict[str, int]) -> dict[str, Any]:
    documents = []
    for path in sorted(directory.glob("*.txt"), key=lambda path: path.name):
        content = path.read_bytes()
        text = content.decode("utf-8")
        digest = hashlib.sha256(content).hexdigest()
        documents.append(
            {
                "file": path.name,
                "kind": path.stem.partition("-")[0],
                "words": len(text.split()),
                # as layer_surgery reads the file: without its final newlines
                "tokens": count(text.rstrip("\n")) if count else known.get(digest),
                "sha256": digest,
            }
        )
    return {"documents": documents, **_totals(documents), "number": len(documents)}


def _files(directory: Path) -> dict[str, Any]:
    """What another script writes (build_tasks.py, build_retrieval.py): configurations and items."""
    files = [
        {"file": path.name, "sha256": hashlib.sha256(content := path.read_bytes()).hexdigest()}
        | ({"items": len(content.splitlines())} if path.suffix == ".jsonl" else {})
        for path in sorted(directory.glob("*"), key=lambda path: path.name)
        if path.is_file()
    ]
    return {"files": files, "items": sum(file.get("items", 0) for file in files)}


def _totals(entries: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(entry[key] or 0 for entry in entries) for key in ("words", "tokens")}


def _counter(tokenizer: Path) -> CountTokens:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    return lambda text: len(loaded(text, add_special_tokens=False, verbose=False)["input_ids"])


def _identity(tokenizer: Path) -> dict[str, str]:
    """The tokenizer by content: a path would mean nothing elsewhere."""
    return {"tokenizer_json_sha256": hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()}


def broken_rules(directory: Path, manifest: dict[str, Any]) -> list[str]:
    """Return a sentence for every rule that the texts break."""
    problems = []
    parts = manifest["parts"]
    words = manifest["totals"]["words"]
    if words < MINIMUM_WORDS:
        problems.append(f"{words:,} words in all, but at least {MINIMUM_WORDS:,} are needed")
    share = parts["calibration"]["words"] / max(words, 1)
    if not CALIBRATION_SHARE[0] <= share <= CALIBRATION_SHARE[1]:
        problems.append(f"calibration has {share:.1%} of the words, but must have 75 to 85 %")
    for key in ("file", "sha256"):
        left, right = ({document[key] for document in parts[part]["documents"]} for part in PARTS)
        problems += [f"a document stands in both parts ({key} {value})" for value in sorted(left & right)]
    calibration, evaluation = (_long_paragraphs(directory / part) for part in PARTS)
    problems += [
        f"a paragraph stands in both parts: {calibration[text]} and {evaluation[text]}"
        for text in sorted(calibration.keys() & evaluation.keys())
    ]
    return problems


def _long_paragraphs(directory: Path) -> dict[str, str]:
    """Map each long paragraph, its white space and case evened out, to the file it stands in."""
    paragraphs = {}
    for path in sorted(directory.glob("*.txt")):
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            words = paragraph.lower().split()
            if len(words) >= LONG_PARAGRAPH:
                paragraphs[" ".join(words)] = path.name
    return paragraphs


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path, nargs="?", help="folder of the tokenizer that counts tokens")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything is wrong")
    parser.add_argument("--directory", type=Path, default=Path(__file__).resolve().parent, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    path: Path = options.directory / "MANIFEST.json"
    present_text = path.read_text(encoding="utf-8") if path.is_file() else None
    manifest = build(options.directory, options.tokenizer, json.loads(present_text) if present_text else None)
    text = json.dumps(manifest, indent=2) + "\n"
    problems = broken_rules(options.directory, manifest)
    uncounted = [
        document["file"]
        for part in PARTS
        for document in manifest["parts"][part]["documents"]
        if not document["tokens"]
    ]
    if options.check:
        if text != present_text:
            problems.append("MANIFEST.json is out of date; run this script with a tokenizer")
    elif uncounted:
        problems.append(f"give a tokenizer folder: no token count is known for {', '.join(uncounted)}")
    else:
        path.write_text(text, encoding="utf-8")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{manifest['totals']['words']:,} words, {manifest['totals']['tokens']:,} tokens")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
