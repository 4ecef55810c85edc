"""Write the bundled retrieval sets (retrieval/*.jsonl), or check that they are what this script writes.

    python calibration_data/build_retrieval.py            write them
    python calibration_data/build_retrieval.py --check    exit 1 if one differs

Made from the bundled text. A paragraph of two sentences or more gives a query, its first sentence, and a passage, the
rest. Passages of both parts are searched; queries are of the evaluation part only, so no text that statistics are taken
from is asked for. Each query has the passage that it opens, and the text that both are from:

    passages.jsonl  {"id": "science-hearing/3", "text": "..."}
    queries.jsonl   {"query": "...", "passage": "science-hearing/3"}

After a change run build_manifest.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
#: Words of a query and of a passage, at least. Shorter ones ("Why not?") could be of any text.
QUERY_WORDS, PASSAGE_WORDS = 5, 12
SENTENCE_END = re.compile(r"(?<=[a-z0-9)])[.!?][\"\u201d\u2019)]*(?=\s[\"\u201c\u2018(]*[A-Z0-9])")


class Paragraph(NamedTuple):
    """One paragraph of the bundled text, cut behind its first sentence."""

    id: str
    first: str
    rest: str


def paragraphs(directory: Path) -> Iterator[Paragraph]:
    """Yield the paragraphs of all texts in a folder that are long enough, in the order of file names."""
    for path in sorted(directory.glob("*.txt"), key=lambda path: path.name):
        for number, paragraph in enumerate(path.read_text(encoding="utf-8").split("\n\n")):
            text = " ".join(paragraph.split())
            end = SENTENCE_END.search(text)
            first, rest = (text[: end.end()], text[end.end() :].strip()) if end else (text, "")
            if len(first.split()) >= QUERY_WORDS and len(rest.split()) >= PASSAGE_WORDS:
                yield Paragraph(f"{path.stem}/{number}", first, rest)


def build(directory: Path) -> dict[str, str]:
    """Return the contents of the files by their names."""
    asked = list(paragraphs(directory / "evaluation"))
    searched = [*asked, *paragraphs(directory / "calibration")]
    return {
        "passages.jsonl": _lines({"id": each.id, "text": each.rest} for each in searched),
        "queries.jsonl": _lines({"query": each.first, "passage": each.id} for each in asked),
    }


def _lines(items: Iterator[dict[str, str]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    parser.add_argument("--directory", type=Path, default=HERE, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder: Path = options.directory / "retrieval"
    wrong = []
    for name, text in build(options.directory).items():
        path = folder / name
        if options.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                wrong.append(name)
        else:
            folder.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        print(f"{name}: {text.count(chr(10))} lines")
    for name in wrong:
        print(f"error: retrieval/{name} is out of date; run calibration_data/build_retrieval.py", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
