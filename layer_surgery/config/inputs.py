"""Options that say which text is read, and how it is cut into sequences."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import attrs

from layer_surgery.config.choices import DATA_CHOICES
from layer_surgery.config.declaring import Group, Options, about, at_least, names, path
from layer_surgery.errors import UserError


@attrs.frozen(kw_only=True, slots=False)
class TextConfig(Options):
    """How any text is read."""

    GROUP: ClassVar[Group] = "Model and data"

    sequence_length: int = attrs.field(
        default=256, validator=at_least(2), metadata=about("Tokens in a sequence, in calibration and evaluation.")
    )
    text_column: str | None = attrs.field(
        default=None, metadata=about("Column that holds the text in a table file.", metavar="NAME")
    )
    window_overlap: int | None = attrs.field(
        default=None,
        validator=at_least(0),
        metadata=about(
            "Read tagged words that do not fit into a sequence in several, which share N tokens.",
            metavar="N",
            default="such examples are refused",
        ),
    )


@attrs.frozen(kw_only=True, slots=False)
class CalibrationConfig(TextConfig):
    """Data that are passed through the model to calibrate on."""

    DEFAULT_WEIGHT: ClassVar[float] = 1.0

    calibration: tuple[str, ...] = attrs.field(
        default=("bundled",),
        converter=names,
        metadata=about(
            "Calibration data: bundled, a .txt .jsonl .json .csv .parquet file, or a hub data set "
            "(wikitext2, c4, gsm8k, OWNER/NAME[#CONFIG][@SPLIT]). Rows with prompt and answer, or chat messages, carry "
            "loss on the answer only; a classifier needs rows with text and label, or tokens and tags. "
            "May be given several times to mix sources: --calibration task.jsonl:2 "
            "--calibration bundled:1 takes two thirds of the sequences from task.jsonl. A weight (default "
            f"{DEFAULT_WEIGHT:g}) is a share of sequences, not of the tokens that carry loss; the notes printed on the "
            "way say how many of those each source has.",
            form="repeat",
            metavar="NAME|FILE[:WEIGHT]",
            choices=DATA_CHOICES,
        ),
    )
    samples: int = attrs.field(
        default=128, validator=at_least(1), metadata=about("Calibration sequences, from all sources together.")
    )
    cache: Path | None = attrs.field(
        default=None,
        converter=path,
        metadata=about(
            "Keep the calibration statistics here, so that another target or budget needs no new pass over the data. "
            "They take about as much room as the model.",
            metavar="DIR",
        ),
    )

    def _check(self) -> None:
        if not self.calibration:
            raise UserError("--calibration names no data; give a name or a file, or leave it out for the bundled text.")
        if self.samples < len(self.calibration):
            raise UserError(
                f"--samples is {self.samples}, but --calibration names {len(self.calibration)} sources, and each gives "
                f"at least one sequence; allowed: {len(self.calibration)} or more."
            )
