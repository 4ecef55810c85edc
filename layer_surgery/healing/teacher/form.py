"""The form of a record: what is kept of a teacher's distribution, and with which precision.

**Top k.** Probabilities are kept as whole multiples of a step in their square root, and what is below about a step is
left to the tail. Given bits for values and ids, that is where the error of a divergence is least: rounding log p by d
costs `p d^2 / 2` and saves `-log d`, so d is best in proportion to `1 / sqrt(p)`, which is a uniform step of sqrt(p);
and an id is worth its bits from some probability on, the same for every token. So a token that is sure of itself has a
few entries, and one that is not has many. One number, the step, is chosen so that a token takes as many bytes on
average as were asked for.

**Sample.** Frequencies of ids in a sample from the distribution (Anshumann et al., Sparse Logit Sampling,
https://arxiv.org/abs/2503.16870): an unbiased gradient of the KL divergence in fewer bytes. The sample is systematic
(one random offset, then equal distances along the cumulated probabilities): each frequency is within one draw of the
probability, which a sample of independent draws is not.

Shapes: n tokens, V vocabulary, e entries of all tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layer_surgery.errors import UserError
from layer_surgery.healing.teacher.bits import I64
from layer_surgery.healing.teacher.entries import MOST_LEVEL

#: Largest tail as it is stored: its square root takes 16 bits.
TAIL_SCALE = 65535
#: A probability is kept if its square root is at least so many steps. Measured by experiments/healing/teacher_cache.py.
THRESHOLD = 1.4


@dataclass(frozen=True, kw_only=True)
class RecordForm:
    """What is kept of each token."""

    form: Literal["top_k", "sampled"] = "top_k"
    bytes_per_token: float = 96.0  #: On average, for `top_k`; what comes out is near it, seldom above.
    most: int = 256  #: Entries of one token, for `top_k`.
    samples: int = 50  #: Draws for each token, for `sampled`.
    temperature: float = 1.0  #: By which logits are divided before.
    seed: int = 0  #: Of the sample.

    def __post_init__(self) -> None:
        for name, least, largest in (("bytes_per_token", 8, 4096), ("most", 1, 1024), ("samples", 1, MOST_LEVEL)):
            value = getattr(self, name)
            if not least <= value <= largest:
                raise UserError(f"{name} of the teacher's records is {value}; allowed: {least} to {largest}.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature of the teacher's records is {self.temperature}; allowed: above 0.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that count for this form."""
        unused = ("samples", "seed") if self.form == "top_k" else ("bytes_per_token", "most")
        return {name: value for name, value in asdict(self).items() if name not in unused}


@dataclass(frozen=True)
class Observed:
    """What was seen of n tokens: the largest probabilities, or the counts in a sample. Ids are not in any order."""

    counts: I64  #: [n] entries of each token.
    ids: I64  #: [e]
    values: NDArray[np.float64]  #: [e] probabilities above 0, or counts in the sample.

    @property
    def tokens(self) -> I64:
        """The token of each entry [e]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @classmethod
    def joined(cls, parts: list[Observed]) -> Observed:
        """Return parts one after the other; there is one at least."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("counts", "ids", "values")))

    def split(self, tokens: int) -> tuple[Observed, Observed]:
        """Return the first so many tokens, and the others."""
        entries = int(self.counts[:tokens].sum())
        return (
            Observed(self.counts[:tokens], self.ids[:entries], self.values[:entries]),
            Observed(self.counts[tokens:], self.ids[entries:], self.values[entries:]),
        )

    def of(self, chosen: NDArray[np.bool_]) -> Observed:
        """Return the tokens that are chosen [n]."""
        entries = chosen[self.tokens]
        return Observed(self.counts[chosen], self.ids[entries], self.values[entries])

    def where(self, kept: NDArray[np.bool_]) -> Observed:
        """Return the entries that are kept [e]."""
        counts = np.bincount(self.tokens[kept], minlength=len(self.counts))
        return Observed(counts, self.ids[kept], self.values[kept])


def observe(logits: Tensor, form: RecordForm, first_token: int) -> Observed:
    """Return what a record of this form can be made of, from logits [n, V] of tokens number `first_token` and on."""
    log_probs = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / form.temperature).log_softmax(dim=1)
    if form.form == "top_k":
        kept, ids = log_probs.topk(min(form.most, logits.shape[1]), dim=1)
        values = kept.double().exp().cpu().numpy()
        positive = values > 0
        return Observed(positive.sum(axis=1), ids.cpu().numpy()[positive], values[positive])
    offsets = _uniform(form.seed, np.arange(first_token, first_token + len(logits)))
    return _systematic(log_probs, torch.from_numpy(offsets).to(logits.device), form.samples)


def _systematic(log_probs: Tensor, offsets: Tensor, samples: int) -> Observed:
    """Return the counts of ids where `samples` equal distances on from the offsets [n] in [0, 1) fall."""
    cumulated = log_probs.double().exp().cumsum(dim=1)
    cumulated = cumulated / cumulated[:, -1:]
    places = (torch.arange(samples, device=offsets.device) + offsets[:, None].double()) / samples
    drawn = torch.searchsorted(cumulated, places, right=True).clamp_max(log_probs.shape[1] - 1).cpu().numpy()
    begins = np.diff(drawn, axis=1, prepend=-1) > 0  # places ascend, and so do ids
    starts = np.flatnonzero(begins.reshape(-1))
    counts = np.diff(starts, append=begins.size)
    return Observed(begins.sum(axis=1), drawn.reshape(-1)[starts], counts.astype(np.float64))


def _uniform(seed: int, numbers: I64) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each whole number [n], the same in whatever pieces they are asked for.

    Steele, Lea & Flood, Fast splittable pseudorandom number generators (2014).
    """
    with np.errstate(over="ignore"):
        state = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + numbers.astype(np.uint64) + np.uint64(1)
        state = state * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
