"""Several sources in one set of packed sequences."""

import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import ROUND_DOWN, Context, Decimal
from fractions import Fraction
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from layer_surgery.data.documents import LoadedData
from layer_surgery.data.objective import NEXT_TOKEN, Objective
from layer_surgery.data.packing import TooFewSequencesError, pack_calibration
from layer_surgery.data.tokens import PackedTokens, SourceShare, joined
from layer_surgery.data.weights import WeightedSource, apportion
from layer_surgery.errors import DataError

_SEEDS = 2**63 - 1


def pack_mixture(
    data: Sequence[LoadedData],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    objective: Objective = NEXT_TOKEN,
    alone: bool = False,
    overlap: int | None = None,
) -> PackedTokens:
    """Pack `samples` sequences in all, divided among the sources by weight and put in an order chosen by `seed`.

    A weight is a share of *sequences*. It is not a share of the loss: a row of a text has loss on nearly all of its
    tokens, a row of task examples on its answers only. `PackedTokens.sources` says how it came out.

    Each source is packed by `pack_calibration`, with a seed of its own, so kinds may be mixed: masks go by row. A lone
    source is packed with `seed` itself, whatever its weight.

    Args:
        data: at least one source.
        weights: one for each source, finite and above 0.
        samples: at least as many as there are sources.
        objective: what the model's head is for.
        alone: whether each example has a sequence of its own.
        overlap: tokens that windows of tagged words share; None if each example has to be one sequence.

    Raises `DataError`: as `pack_calibration`; it names the source.
    """
    size: dict[str, Any] = {"sequence_length": sequence_length, "alone": alone, "objective": objective}
    size["overlap"] = overlap
    if len(data) == 1:
        tokens = pack_calibration(data[0], tokenizer, samples=samples, seed=seed, **size)
        return replace(tokens, sources=(_share(tokens, weights[0]),))
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(_SEEDS, (len(data),), generator=generator).tolist()
    parts = []
    for position, share in enumerate(apportion(weights, samples)):
        try:
            parts.append(pack_calibration(data[position], tokenizer, samples=share, seed=seeds[position], **size))
        except TooFewSequencesError as error:
            raise DataError(
                f"{error.found}, fewer than its share of --samples {samples}, which is {share}; "
                f"{_advice(weights, position, samples, error.count)}, or pass more data."
            ) from error
    order = torch.randperm(samples, generator=generator)
    name = " + ".join(str(WeightedSource(part.name, weight)) for part, weight in zip(parts, weights, strict=True))
    mixed = joined(name, parts, order)
    return replace(mixed, sources=tuple(_share(part, weight) for part, weight in zip(parts, weights, strict=True)))


def pack_at_most(
    data: Sequence[LoadedData],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    alone: bool = False,
    objective: Objective = NEXT_TOKEN,
    overlap: int | None = None,
) -> PackedTokens:
    """Pack like `pack_mixture`, but where the sources have fewer sequences than `samples`, as many as there are.

    The weights hold all the same: the source that is short for its weight decides.
    Raises `DataError`: as `pack_calibration`, and for a source without a single sequence.
    """
    size: dict[str, Any] = {
        "sequence_length": sequence_length,
        "seed": seed,
        "alone": alone,
        "objective": objective,
        "overlap": overlap,
    }
    most = samples
    for each, weight in zip(data, weights, strict=True):
        share = max(1, math.ceil(samples * weight / sum(weights)))
        try:
            pack_calibration(each, tokenizer, samples=share, **size)
        except TooFewSequencesError as error:
            if error.count == 0:
                raise DataError(f"{error.found}; lower --sequence-length, or pass more data.") from error
            most = min(most, math.floor(error.count * sum(weights) / weight))
    return pack_mixture(data, weights, tokenizer, samples=max(len(data), most), **size)


def _share(part: PackedTokens, weight: float) -> SourceShare:
    return SourceShare(
        name=part.name,
        weight=weight,
        sequences=part.sequences,
        tokens_available=part.tokens_available,
        tokens=int(part.valid.sum()),
        predicted_tokens=part.predicted_tokens,
        sha256=part.sha256,
    )


def _advice(weights: Sequence[float], position: int, samples: int, count: int) -> str:
    """Advise what to do about a source of which there are only `count` sequences.

    Its share is at most its quota (`samples` x weight / sum of weights) rounded up, or the one that each source gets,
    so both limits are where the quota is `count`.
    """
    if count == 0:
        return "lower --sequence-length"
    weight, total = Fraction(weights[position]), sum(map(Fraction, weights))
    most = max(len(weights), math.floor(count * total / weight))
    limit = count * (total - weight) / (samples - count)
    rounded = Context(prec=3, rounding=ROUND_DOWN).divide(Decimal(limit.numerator), Decimal(limit.denominator))
    return (
        f"lower --samples to at most {most}, or its weight (now {weights[position]:g}) to at most {float(rounded):g}, "
        "or lower --sequence-length"
    )
