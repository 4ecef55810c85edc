"""Options that several commands take."""

from __future__ import annotations

import re
from pathlib import Path

import click

from layer_surgery.cli.common import combine
from layer_surgery.config import DEFAULT_METHOD, BudgetConfig, CalibrationConfig, RefitConfig, RuntimeConfig


def _bytes(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"'{value}' is not a size; give for example 8GB or 500MiB.")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


REMOVE = click.option(
    "--remove",
    default=BudgetConfig.remove,
    show_default=True,
    metavar="layer|attention|mlp",
    help="Operate on whole layers, or only on their attention or their MLP; the budget is then of these.",
)
REFIT = combine(
    click.option(
        "--refit/--no-refit",
        default=None,
        help="Re-solve what stays, in closed form, so that the result follows the original.  [default: with --method "
        f"{DEFAULT_METHOD}]",
    ),
    click.option(
        "--refit-scope",
        default=RefitConfig.scope,
        show_default=True,
        metavar="all|operated",
        help="operated: low-rank layers only; the others stay as they are, bit for bit.",
    ),
    click.option(
        "--refit-general",
        default=RefitConfig.general,
        show_default=True,
        metavar="F",
        help="Sequences of general text (the bundled one) that the refit looks at, for each calibration sequence; at "
        "least 8, or none with 0.",
    ),
)
RUNTIME = combine(
    click.option(
        "--device",
        default=RuntimeConfig.device,
        show_default=True,
        metavar="auto|cpu|cuda[:N]",
        help="Where to compute.",
    ),
    click.option(
        "--dtype",
        default=RuntimeConfig.dtype,
        show_default=True,
        metavar="auto|float32|bfloat16|float16",
        help="dtype of computation; auto is float32 on a CPU and the checkpoint's own on CUDA. The saved checkpoint "
        "always has the original's dtype.",
    ),
    click.option(
        "--batch-size",
        default=RuntimeConfig.batch_size,
        show_default=True,
        help="Sequences at a time; changes speed, not results.",
    ),
    click.option(
        "--memory-limit",
        callback=_bytes,
        metavar="SIZE",
        help="Stay below this, such as 8GB, where there is a choice of what to keep in memory, and refuse a refit that "
        "does not fit.  [default: what is free]",
    ),
    click.option("--seed", default=RuntimeConfig.seed, show_default=True, help="Seed of every random choice."),
    click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the checkpoint."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own messages."),
)
CALIBRATION = combine(
    click.option(
        "--calibration",
        multiple=True,
        default=CalibrationConfig.sources,
        show_default=True,
        metavar="NAME|FILE[:WEIGHT]",
        help="Calibration data: bundled, a .txt .jsonl .json .csv .parquet file, or a hub data set "
        "(wikitext2, c4, gsm8k, OWNER/NAME[#CONFIG][@SPLIT]). Rows with prompt and answer, or chat messages, carry "
        "loss on the answer only. May be given several times to mix sources: --calibration task.jsonl:2 "
        "--calibration bundled:1 takes two thirds of the sequences from task.jsonl. A weight (default "
        f"{CalibrationConfig.DEFAULT_WEIGHT:g}) is a share of sequences, not of the tokens that carry loss; the notes "
        "printed on the way say how many of those each source has.",
    ),
    click.option(
        "--samples",
        default=CalibrationConfig.samples,
        show_default=True,
        help="Calibration sequences, from all sources together.",
    ),
    click.option(
        "--sequence-length",
        default=CalibrationConfig.sequence_length,
        show_default=True,
        help="Tokens in a sequence, in calibration and evaluation.",
    ),
    click.option("--text-column", metavar="NAME", help="Column that holds the text in a table file."),
    click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Keep the calibration statistics here, so that another target or budget needs no new pass over the data. "
        "They take about as much room as the model.",
    ),
)
