"""Options that say what is measured, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import attrs

from layer_surgery.config.choices import BUNDLED_TASKS, DATA_CHOICES
from layer_surgery.config.declaring import Group, Options, about, at_least, names, paths, whole_numbers
from layer_surgery.config.inputs import TextConfig
from layer_surgery.errors import UserError


@attrs.frozen(kw_only=True, slots=False)
class ContinuationConfig(Options):
    """Greedy continuations of a few prompts, side by side."""

    GROUP: ClassVar[Group] = "Evaluation"
    DEFAULT_COUNT: ClassVar[int] = 3
    PROMPT_TOKENS: ClassVar[int] = 24  #: Length of a prompt from the text.
    NEW_TOKENS: ClassVar[int] = 32

    continuations: int | None = attrs.field(
        default=None,
        validator=at_least(0),
        metadata=about(
            "Prompts from the first text that both models continue greedily; 0 for none.",
            metavar="N",
            default=f"{DEFAULT_COUNT}, none for a large model",
        ),
    )
    prompts: tuple[str, ...] = attrs.field(
        default=(),
        converter=names,
        metadata=about("A prompt of your own instead; repeatable.", form="repeat", metavar="TEXT", name="prompt"),
    )

    def _check(self) -> None:
        if self.continuations and self.prompts:
            raise UserError("--continuations takes prompts from the text and --prompt gives them; use one of the two.")
        if not all(prompt.strip() for prompt in self.prompts):
            raise UserError("--prompt is empty; give some text to continue.")


@attrs.frozen(kw_only=True, slots=False)
class SpeedConfig(Options):
    """How speed and memory of generation are measured."""

    GROUP: ClassVar[Group] = "Evaluation"

    speed: bool = attrs.field(default=False, metadata=about("Speed and memory of generation.", form="switch"))
    speed_batch_sizes: tuple[int, ...] = attrs.field(
        default=(1,),
        converter=whole_numbers,
        validator=at_least(1),
        metadata=about("Sequences.", form="list", metavar="N,...", items="whole numbers", example="1,8"),
    )
    speed_lengths: tuple[int, ...] = attrs.field(
        default=(128,),
        converter=whole_numbers,
        validator=at_least(1),
        metadata=about("Tokens of a prompt.", form="list", metavar="N,...", items="whole numbers", example="1,8"),
    )
    speed_new_tokens: int = attrs.field(default=32, validator=at_least(2), metadata=about("Tokens generated."))
    speed_repeats: int = attrs.field(default=5, validator=at_least(1), metadata=about("Runs of each model, in turns."))

    def _check(self) -> None:
        lists = {"--speed-batch-sizes": self.speed_batch_sizes, "--speed-lengths": self.speed_lengths}
        for option, values in lists.items():
            if not values:
                raise UserError(f"{option} is empty; give for example 1,8.")
        for field in attrs.fields(SpeedConfig):
            if not self.speed and getattr(self, field.name) != field.default:
                option = f"--{field.name.replace('_', '-')}"
                raise UserError(f"{option} only counts with --speed; add that, or leave it out.")


@attrs.frozen(kw_only=True, slots=False)
class TaskConfig(Options):
    """Which tasks are run: lm-eval's, of embedding models mteb's."""

    GROUP: ClassVar[Group] = "Evaluation"

    tasks: tuple[str, ...] = attrs.field(
        default=(),
        converter=names,
        metadata=about(
            "lm-eval tasks, groups or YAML files to run before and after; `bundled` is a set that needs no network. Of "
            "embedding models: tasks of mteb, NAME or NAME:SUBSET.",
            form="list",
            metavar="NAME|FILE,...",
            choices=BUNDLED_TASKS,
        ),
    )
    task_path: tuple[Path, ...] = attrs.field(
        default=(),
        converter=paths,
        metadata=about(
            "Directory with lm-eval task configurations (or classes of mteb) of your own; may be given several times. "
            "Python that the named tasks refer to (`!function`), or in which they stand, is run: name only tasks that "
            "you trust, here and in YAML files.",
            form="repeat",
            metavar="DIR",
        ),
    )
    num_fewshot: int | None = attrs.field(
        default=None,
        validator=at_least(0),
        metadata=about("Examples before each item.", metavar="N", default="the task's own"),
    )
    limit: int | None = attrs.field(
        default=None,
        validator=at_least(1),
        metadata=about("Only the first N items of each task.", metavar="N", default="all"),
    )

    def _check(self) -> None:
        for name in self.tasks:
            if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
                raise UserError(f"--tasks names the file {name}, which is not there.")
        for folder in self.task_path:
            if not folder.is_dir():
                raise UserError(f"--task-path {folder} is not a directory; give the folder of the task's YAML files.")
        how = {"--task-path": self.task_path or None, "--num-fewshot": self.num_fewshot, "--limit": self.limit}
        for option, value in how.items():
            if value is not None and not self.tasks:
                raise UserError(f"{option} says how tasks are run, but no task is named; add --tasks NAME.")


@attrs.frozen(kw_only=True, slots=False)
class PerplexityConfig(TextConfig):
    """The texts that perplexity and distance to the original are measured on."""

    GROUP: ClassVar[Group] = "Evaluation"

    eval_data: tuple[str, ...] = attrs.field(
        default=("bundled",),
        converter=names,
        metadata=about(
            "Text to measure perplexity on, or labelled examples for a classifier; may be given several times.",
            form="repeat",
            metavar="NAME|FILE",
            choices=DATA_CHOICES,
        ),
    )
    eval_windows: int | None = attrs.field(
        default=None,
        validator=at_least(1),
        metadata=about("Use only the first N windows of each text.", metavar="N", default="all"),
    )
    distance: bool = attrs.field(
        default=True, metadata=about("KL divergence and top-1 agreement with the original.", form="switch")
    )

    def _check(self) -> None:
        repeated = [name for name in self.eval_data if self.eval_data.count(name) > 1]
        if repeated:
            raise UserError(f"--eval-data names '{repeated[0]}' more than once; give each text once.")


# The bases of a class are listed last group first: that is the order in which attrs, help texts and signatures have
# them the right way round.
@attrs.frozen(kw_only=True, slots=False)
class EvaluationConfig(ContinuationConfig, SpeedConfig, TaskConfig, PerplexityConfig):
    """Everything that is measured."""
