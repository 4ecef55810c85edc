"""The table as a page: what works at a glance, why the rest does not, and then the numbers."""

from __future__ import annotations

import json
import textwrap

from kinds import FAMILIES, KINDS, TITLES, options_of
from rows import ROWS, reason

Key = tuple[str, str, str]
"""Family, kind, row."""
Cell = dict[str, str]
Cells = dict[Key, Cell]
#: Characters of an error.
SHOWN = 160
COLUMNS = ("original", *KINDS, "dense")
NOTES = """\
# Consumers

Made by `experiments/consumers/table.py` together with `table.json`; no cell by hand. One directory of each kind, made
at the default settings, is loaded by each tool and used, on a CPU, by the scripts in `experiments/consumers/clients`
and the checks in `tests/consumer_checks.py`. Results are compared with those of transformers on the same directory, in
float32.
"""
LEGEND = """\
**yes**: the tool works, and what it computes is what transformers compute. **no**: the reason has this number below. A
dash: there is nothing to do in such a result. A dot: not run.
"""
SEVERAL = "Where {families} differ, each has its word, in this order.\n"
NUMBERS = """\
Where a title ends in logits, the number is the largest difference as a fraction of the largest logit; with a star,
weights were rounded, and it is the norm of the difference as a fraction of the norm of the logits.
"""


def page(cells: Cells, packages: dict[str, dict[str, str]]) -> str:
    """Return the page as Markdown."""
    families = [family for family in FAMILIES if any(key[0] == family for key in cells)]
    kinds = [kind for kind in COLUMNS if any(key[1] == kind for key in cells)]
    reasons = list(dict.fromkeys(reason(key[2], cells[key]["error"]) for key in in_order(cells, families, kinds)))
    lines = [NOTES, tally(cells), "", "## What works", "", LEGEND]
    if len(families) > 1:
        lines.append(SEVERAL.format(families=joined(families)))
    said = {(kind, row): glance(cells, families, kind, row, reasons) for kind in kinds for row in ROWS}
    lines += grid(kinds, said, short=True)
    lines += ["", "## Why not", ""]
    for number, words in enumerate(reasons, start=1):
        lines += [f"{number}. {words}", *errors(cells, families, kinds, words)]
    lines += ["", "## Numbers", "", NUMBERS]
    for family in families:
        lines += [f"### {joined([family])}", "", *described(kinds, family), ""]
        lines += [*grid(kinds, {key[1:]: figure(cells[key]) for key in cells if key[0] == family}), ""]
    lines += ["## Versions", ""]
    for name, numbers in packages.items():
        versions = ", ".join(f"{package} {number}" for package, number in numbers.items())
        lines.append(f"- environment {name}: {versions}")
    return "\n".join(lines).rstrip() + "\n"


def joined(families: list[str]) -> str:
    return " and ".join(f"{FAMILIES[family].parent.name} ({model_type(family)})" for family in families)


def model_type(family: str) -> str:
    name: str = json.loads((FAMILIES[family] / "config.json").read_text(encoding="utf-8"))["model_type"]
    return name


def in_order(cells: Cells, families: list[str], kinds: list[str]) -> list[Key]:
    """Return the keys of the cells with an error, in the order of the page."""
    keys = ((family, kind, row) for row in ROWS for kind in kinds for family in families)
    return [key for key in keys if "error" in cells.get(key, {})]


def tally(cells: Cells) -> str:
    counts = {result: sum(cell["result"] == result for cell in cells.values()) for result in ("yes", "no", "-")}
    rest = len(cells) - sum(counts.values())
    possible = len(FAMILIES) * len(COLUMNS) * len(ROWS)
    words = f"{len(cells)} of {possible} cells were run: {counts['yes']} work, {counts['no']} do not, "
    words += f"in {counts['-']} there is nothing to do"
    return words + (f", {rest} could not be run." if rest else ".")


def glance(cells: Cells, families: list[str], kind: str, row: str, reasons: list[str]) -> str:
    """Return what all families say; where they differ, each its own."""
    said = [word(cells.get((family, kind, row)), row, reasons) for family in families]
    return said[0] if len(set(said)) == 1 else " / ".join(said)


def word(cell: Cell | None, row: str, reasons: list[str]) -> str:
    if cell is None:
        return "·"
    if "error" in cell:
        return f"**{cell['result']}** ({reasons.index(reason(row, cell['error'])) + 1})"
    return cell["result"]


def figure(cell: Cell) -> str:
    """Return what was measured."""
    return f"**{cell['result']}**" if "error" in cell else cell.get("measure") or cell["result"]


def grid(kinds: list[str], words: dict[tuple[str, str], str], *, short: bool = False) -> list[str]:
    lines = ["| | " + " | ".join(TITLES[kind] for kind in kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name, row in ROWS.items():
        found = [words.get((kind, name), "·") for kind in kinds]
        title = row.tool if short else row.title
        lines.append(f"| {title.replace('*', ' (*)')} | " + " | ".join(found) + " |")
    return lines


def described(kinds: list[str], family: str) -> list[str]:
    """Return how each kind was made."""
    lines = []
    for kind in kinds:
        if kind in KINDS:
            given = options_of(kind, FAMILIES[family]).items()
            options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given)
            lines.append(f"- {TITLES[kind]}: `compress {options}`")
    if "dense" in kinds:
        lines.append(f"- {TITLES['dense']}: `export --dense` of {TITLES['layers']}")
    return lines


def errors(cells: Cells, families: list[str], kinds: list[str], words: str) -> list[str]:
    """Return a line for each error that a reason is about, with the row, the kinds and the families that have it."""
    found: dict[tuple[str, str], list[Key]] = {}
    for key in in_order(cells, families, kinds):
        error = cells[key]["error"]
        if reason(key[2], error) == words:
            found.setdefault((key[2], error), []).append(key)
    lines = []
    for (row, error), keys in found.items():
        titles = ", ".join(dict.fromkeys(TITLES[key[1]] for key in keys))
        where = ", ".join(dict.fromkeys(key[0] for key in keys))
        lines.append(f"   - {ROWS[row].tool}; {titles} ({where}): `{shown(error)}`")
    return lines


def shown(error: str) -> str:
    """Return the beginning of an error, as inline code; all of it is in the JSON file."""
    return textwrap.shorten(error.replace("`", "'"), SHOWN, placeholder=" ...")
