"""The options of the command line that say what is measured."""

from __future__ import annotations

from pathlib import Path

import click

from layer_surgery.cli.common import combine, comma_list
from layer_surgery.config import ContinuationConfig, EvaluationConfig, SpeedConfig


def _default(values: tuple[int, ...]) -> str:
    return f"[default: {','.join(map(str, values))}]"


_NUMBERS = comma_list(int, "whole numbers", "1,8")


MEASUREMENTS = combine(
    click.option(
        "--eval-data",
        multiple=True,
        default=EvaluationConfig.sources,
        show_default=True,
        metavar="NAME|FILE",
        help="Text to measure perplexity on; may be given several times.",
    ),
    click.option(
        "--eval-windows", type=int, metavar="N", help="Use only the first N windows of each text. [default: all]"
    ),
    click.option("--no-eval", is_flag=True, help="Do not measure perplexity and distance."),
    click.option(
        "--distance/--no-distance",
        default=EvaluationConfig.distance,
        show_default=True,
        help="KL divergence and top-1 agreement with the original.",
    ),
    click.option(
        "--tasks",
        multiple=True,
        callback=comma_list(str),
        metavar="A,B",
        help="lm-eval tasks, groups or YAML files to run before and after; `bundled` is a set that needs no network.",
    ),
    click.option(
        "--task-path",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Directory with lm-eval task configurations of your own; may be given several times.",
    ),
    click.option("--num-fewshot", type=int, metavar="N", help="Examples before each item.  [default: the task's own]"),
    click.option("--limit", type=int, metavar="N", help="Only the first N items of each task.  [default: all]"),
    click.option(
        "--speed/--no-speed", default=SpeedConfig.measure, show_default=True, help="Speed and memory of generation."
    ),
    click.option(
        "--speed-batch-sizes",
        callback=_NUMBERS,
        metavar="N,...",
        help=f"Sequences.  {_default(SpeedConfig.batch_sizes)}",
    ),
    click.option(
        "--speed-lengths",
        callback=_NUMBERS,
        metavar="N,...",
        help=f"Tokens of a prompt.  {_default(SpeedConfig.prompt_lengths)}",
    ),
    click.option("--speed-new-tokens", default=SpeedConfig.new_tokens, show_default=True, help="Tokens generated."),
    click.option(
        "--speed-repeats", default=SpeedConfig.repeats, show_default=True, help="Runs of each model, in turns."
    ),
)
EVALUATION = combine(
    MEASUREMENTS,
    click.option(
        "--continuations",
        type=int,
        metavar="N",
        help="Prompts from the first text that both models continue greedily; 0 for none.  [default: "
        f"{ContinuationConfig.DEFAULT_COUNT}, none for a large model]",
    ),
    click.option(
        "--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt of your own instead; repeatable."
    ),
)
