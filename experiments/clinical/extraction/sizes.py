"""How much of everything a run makes: at its default size, and in miniature."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Numbers of notes and of training steps."""

    train: int  #: Notes that the labellers label, and the taggers are trained on.
    few: int  #: Gold notes that the causal LM is fine-tuned on.
    choice: int  #: Gold notes on which the best unions are chosen.
    test: int  #: Notes of each of the two test sets.
    written: int  #: Notes of the inner test set that the causal LMs write findings for, before and after compression.
    encoder_steps: int
    tagger_steps: int
    llm_steps: int
    heal_tokens: int
    samples: int  #: Calibration windows of the tagger, and rows of the causal LM.
    repeats: int  #: Of the measurement of speed; the median counts.


DEFAULT = Size(
    train=160, few=40, choice=20, test=80, written=12, encoder_steps=100, tagger_steps=400, llm_steps=100,
    heal_tokens=150_000, samples=128, repeats=5,
)  # fmt: skip
QUICK = Size(
    train=24, few=6, choice=6, test=8, written=2, encoder_steps=10, tagger_steps=30, llm_steps=4, heal_tokens=3_000,
    samples=24, repeats=1,
)  # fmt: skip
