"""Seconds of every part of a healing, from how often it does what the probe has measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.healing.probe import MOST_RATES, PROBE_EXAMPLES, PROBE_STEPS, PROBE_WINDOWS
from layer_surgery.healing.teacher.cache import SHARD_TOKENS
from layer_surgery.runs.foresight.healing_case import HealingCase, tokens_of
from layer_surgery.runs.foresight.training_probe import TrainingRates
from layer_surgery.runs.healing.length import (
    LOCAL_SHARE,
    LOCAL_STEPS,
    LOCAL_WINDOWS,
    PROBE_SHARE,
    steps_in,
    steps_of_tokens,
    validations_of,
)

#: Learning rates that a probe tries: two where the likeliest is best and its neighbours are not, four at most.
_RATES = (2 + MOST_RATES) / 2
#: Products of states and a matrix of their width, in the error of a layer and in its gradient.
_METRIC = 3
#: Files of a training beside those at its validations: what it begins with, and what comes of it.
_FILES = 2


@dataclass(frozen=True)
class HealingSeconds:
    """A healing, and what its parts take on this machine."""

    case: HealingCase
    rates: TrainingRates
    known: Callable[[PackedTokens], int]  #: Windows from the first on that need not be asked about.

    @property
    def step_tokens(self) -> float:
        """Tokens of a step of the optimiser that are no padding."""
        train = self.case.prepared.data.train
        return self.case.config.step_sequences * int(train.valid.sum()) / train.sequences

    @property
    def step(self) -> float:
        """Seconds of a step of the optimiser on the whole student."""
        rates, case = self.rates, self.case
        each = sum(rates.student.backward.values()) + rates.head
        if case.checkpointing:
            each += sum(rates.student.forward.values())
        if case.both_models:
            each += sum(rates.teacher.forward.values())
        return self.step_tokens * each + rates.optimiser * case.trained.all

    def asking(self, tokens: PackedTokens) -> float:
        """Seconds of asking the original about some windows, those left out that a cache has."""
        case, teacher = self.case, self.case.teacher
        known = 0 if case.slots or "relations" in case.needs else min(self.known(tokens), tokens.sequences)
        missing = tokens.select(slice(known, tokens.sequences))
        if self._asked_a_token == 0 or missing.sequences == 0:
            return 0.0
        window = max(1, case.length * teacher.hidden * teacher.dtype.itemsize)
        together = max(teacher.batch_size, teacher.boundary_bytes // (2 * window))
        walks = 0 if teacher.stay else -(-missing.sequences // together)
        count = tokens_of([missing])
        fitted = self.rates.fitted * min(count, SHARD_TOKENS) if case.keeps_records and not known else 0.0
        return count * self._asked_a_token + fitted + walks * sum(self.rates.teacher.reading.values())

    @property
    def _asked_a_token(self) -> float:
        """Seconds a token of passing the original, and of what is kept of it."""
        rates, case = self.rates, self.case
        if not ({"logits", "states", "relations", "vectors"} & case.needs) or (case.both_models and not case.embeds):
            return 0.0
        head = rates.asked if "logits" in case.needs or case.one_answer else 0.0
        return sum(rates.teacher.forward.values()) + head

    @property
    def validation(self) -> float:
        """Seconds of one validation."""
        return self._validated(self.case.prepared.data.texts.values())

    def probe(self) -> float:
        """Seconds of trying learning rates; 0 where one is given and nothing has to be known of a step's time."""
        config, data = self.case.config, self.case.prepared.data
        if config.learning_rate is not None and config.budget_minutes is None:
            return 0.0
        count = PROBE_EXAMPLES if data.validation.objective.apart else PROBE_WINDOWS
        compared = self._validated(text.select(slice(0, count)) for text in data.texts.values())
        each = PROBE_STEPS * self.step + compared + _FILES * self.rates.written * self.case.trained.all
        tried = 1.0 if config.learning_rate is not None else _RATES
        if config.budget_minutes is not None and config.learning_rate is None:  # further ones are begun in time only
            tried = min(tried, max(1.0, 1 + int(PROBE_SHARE * 60 * config.budget_minutes / each)))
        few = data.first(PROBE_STEPS * config.step_sequences).train
        return compared + tried * each + self.asking(few)

    def steps(self, before: float) -> int:
        """Return the steps of the global stage, before which healing takes so many seconds."""
        config, data = self.case.config, self.case.prepared.data
        if config.budget_minutes is None:
            return steps_of_tokens(config, data)
        window = self.step_tokens / config.step_sequences
        left = 60 * config.budget_minutes - before
        return steps_in(max(1.0, left), data, config, asking=window * self._asked_a_token, step=self.step)

    def training(self, steps: int) -> float:
        """Seconds of so many steps, with validations, and with the comparison of what came of it."""
        validations = validations_of(steps, self.case.prepared.data, self.case.config)
        files = (validations + _FILES) * self.rates.written * self.case.trained.all
        compared = 2  # as it would be saved: before and after
        return steps * self.step + (validations + 1 + compared) * self.validation + files

    def local(self) -> float:
        """Seconds of the local stage: the original's states, then each layer by itself, then the whole."""
        case, rates, data = self.case, self.rates, self.case.prepared.data
        config = case.config
        windows = slice(0, min(LOCAL_WINDOWS, data.data_windows))
        held_out = tokens_of([data.validation])
        tokens = tokens_of([data.train.select(windows)]) + held_out
        walked = sum(rates.teacher.forward.values())
        if config.local_error == "fisher":
            walked += sum(rates.teacher.backward.values()) + rates.teacher.head_backward
        reads = 0.0 if case.teacher.stay else 2 * sum(rates.teacher.reading.values())
        seconds = tokens * walked + reads
        validations = validations_of(LOCAL_STEPS, data, config)
        tried = 0.0 if config.learning_rate is not None else _RATES
        for index in case.positions:
            student = rates.student
            share = _METRIC * case.student.hidden**2 / max(1, case.student.layers[index].parameters)
            measured = student.forward[index] * (1 + (share if config.local_error == "fisher" else 0.0))
            step = self.step_tokens * (student.backward[index] + measured - student.forward[index])
            step += rates.optimiser * case.student.layers[index].parameters
            probed = tried * (
                PROBE_STEPS * step + min(1.0, PROBE_WINDOWS / data.validation.sequences) * held_out * measured
            )
            each = probed + LOCAL_STEPS * step + (validations + 2) * held_out * measured
            if config.budget_minutes is not None:
                each = min(each, probed + LOCAL_SHARE * 60 * config.budget_minutes / len(case.positions))
            seconds += each
        return seconds + 2 * self.validation

    def _validated(self, texts: Iterable[PackedTokens]) -> float:
        each = sum(self.rates.student.forward.values()) + self.rates.student.head
        return tokens_of(texts) * each
