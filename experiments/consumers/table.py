"""What works for which kind of result: every cell is one tool doing its work on a saved directory.

    python experiments/consumers/table.py SCRATCH --clients ENVIRONMENTS [--rows ...] [--kinds ...] [--families ...]

ENVIRONMENTS is the folder that `clients/make.sh` has filled. SCRATCH gets the results (`kinds.py`), what the tools
print (`logs/`), and `cells.jsonl`: cells that are finished are there and are not made again, so the command goes on
where it was stopped. Take another SCRATCH after a change of the product, or name rows with `--again`.

Writes reports/consumers/table.json and table.md from all cells in SCRATCH.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from clients.cells import MARK
from common import ROOT, write_report
from kinds import FAMILIES, KINDS, OTHER_KINDS, make, options_of
from page import Cell, Cells, Key, page
from rows import PROJECT, ROWS

CLIENTS = Path(__file__).resolve().parent / "clients"


class Client:
    """A running client process, which is asked for one cell after another."""

    def __init__(self, name: str, interpreter: Path, scratch: Path) -> None:
        self.log = scratch / "logs" / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        own = {"PROJECT_PYTHON": sys.executable, "HF_MODULES_CACHE": str(scratch / "modules")}
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | own
        if interpreter == Path(sys.executable):
            variables["PYTHONPATH"] = str(ROOT)
        command = [str(interpreter), str(CLIENTS / f"{name}.py"), "--each"]
        with self.log.open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=variables
            )

    def cell(self, directory: Path, original: Path, row: str) -> Cell:
        """Return a cell; raise `RuntimeError` with the last line of the log if the process has ended."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps([str(directory), str(original), row]), file=self.process.stdin, flush=True)
            for line in self.process.stdout:
                if line.startswith(MARK):
                    found: Cell = json.loads(line.removeprefix(MARK))
                    return found
        except BrokenPipeError:
            pass
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else "the client ended without a word")

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def interpreter_of(environment: str, environments: Path) -> Path:
    return Path(sys.executable) if environment == PROJECT else environments / environment / "bin" / "python"


def make_cells(wanted: list[Key], scratch: Path, environments: Path) -> Iterator[tuple[Key, Cell]]:
    """Make cells client by client, because starting one takes longer than most cells."""
    for name, environment in dict.fromkeys((ROWS[row].client, ROWS[row].environment) for _, _, row in wanted):
        keys = [key for key in wanted if (ROWS[key[2]].client, ROWS[key[2]].environment) == (name, environment)]
        interpreter = interpreter_of(environment, environments)
        if not interpreter.exists():
            yield from ((key, {"result": "not run", "error": f"no environment {environment}"}) for key in keys)
            continue
        client = Client(name, interpreter, scratch)
        for family, kind, row in keys:
            directory = make(family, kind, scratch / "results")
            try:
                yield (family, kind, row), client.cell(directory, FAMILIES[family], row)
            except RuntimeError as error:
                yield (family, kind, row), {"result": "not run", "error": str(error)[:300]}
                client = Client(name, interpreter, scratch)
        client.end()


def stored(file: Path) -> Cells:
    """Return the cells of earlier runs; of one that was made twice, the later."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {tuple(record["key"]): record["cell"] for record in map(json.loads, lines)}


def versions(environments: Path) -> dict[str, dict[str, str]]:
    """Return the versions of the packages that a row names, by environment."""
    found: dict[str, dict[str, str]] = {}
    for row in ROWS.values():
        interpreter = interpreter_of(row.environment, environments)
        folders = [str(path) for path in interpreter.parents[1].glob("lib/python3*/site-packages")]
        for package in row.packages:
            for distribution in importlib.metadata.distributions(name=package.replace("_", "-"), path=folders):
                found.setdefault(row.environment, {})[distribution.name] = distribution.version
    return found


def report(cells: Cells, output: Path, environments: Path) -> None:
    packages = versions(environments)
    rows: dict[str, Any] = {}
    for (family, kind, row), cell in sorted(cells.items()):
        rows.setdefault(family, {}).setdefault(row, {})[kind] = cell
    made = {family: {kind: options_of(kind, original) for kind in KINDS} for family, original in FAMILIES.items()}
    write_report(output / "table.json", {"kinds": made, "packages": packages, "cells": rows})
    (output / "table.md").write_text(page(cells, packages), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--clients", type=Path, required=True, metavar="ENVIRONMENTS")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--kinds", nargs="*", choices=[*OTHER_KINDS, *KINDS], default=[*KINDS, *OTHER_KINDS])
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--again", nargs="*", choices=list(ROWS), default=[], metavar="ROW", help="make these anew")
    parser.add_argument("--output", type=Path, default=ROOT / "reports" / "consumers")
    options = parser.parse_args()
    file = options.scratch / "cells.jsonl"
    options.scratch.mkdir(parents=True, exist_ok=True)
    cells = stored(file)
    wanted = [
        key
        for key in itertools.product(options.families, options.kinds, options.rows)
        if key[2] in options.again or cells.get(key, {"result": "not run"})["result"] == "not run"
    ]
    made = make_cells(wanted, options.scratch, options.clients)
    for _, of_client in itertools.groupby(made, lambda found: ROWS[found[0][2]].environment):
        for key, cell in of_client:
            cells[key] = cell
            with file.open("a", encoding="utf-8") as out:
                print(json.dumps({"key": key, "cell": cell}), file=out)
            print(*key, cell["result"], cell.get("measure") or cell.get("error", ""), sep="  ", flush=True)
        report(cells, options.output, options.clients)
    report(cells, options.output, options.clients)


if __name__ == "__main__":
    main()
