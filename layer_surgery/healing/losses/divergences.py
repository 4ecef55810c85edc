"""Divergences of the student's next-token distribution q from the teacher's p, at a temperature T.

All are in nats for each token and multiplied by T^2 (the total variation by T), so that the size of the gradient does
not depend on T (Hinton, Vinyals & Dean, https://arxiv.org/abs/1503.02531). Against the teacher's top k and tail they
are taken over k + 1 outcomes. Shapes: n tokens, m outcomes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layer_surgery.healing.losses.inputs import TokenLogits
from layer_surgery.healing.losses.outcomes import outcomes
from layer_surgery.healing.losses.registry import LOSSES, OPEN_UNIT, POSITIVE, Interval


@LOSSES.add(
    "kl",
    needs="logits",
    teachers=("dense", "top_k", "sampled"),
    allowed={"temperature": POSITIVE},
)
def forward_kl(tokens: TokenLogits, *, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(p || q) [n].

    Against a sampled teacher only its gradient means something: it is that of KL(p || q) on average over samples
    (https://arxiv.org/abs/2503.16870), while the value has the entropy of the sample in the place of the teacher's.
    """
    p, q = outcomes(tokens, temperature)
    return temperature**2 * _kl(p, q)


@LOSSES.add(
    "reverse_kl",
    needs="logits",
    teachers=("dense", "top_k"),
    allowed={"temperature": POSITIVE},
)
def reverse_kl(tokens: TokenLogits, *, temperature: float = 1.0) -> Tensor:
    """Return T^2 KL(q || p) [n]; the gradient is with respect to both places of q."""
    p, q = outcomes(tokens, temperature)
    return temperature**2 * _kl(q, p)


@LOSSES.add(
    "skew_kl",
    needs="logits",
    teachers=("dense", "top_k"),
    allowed={"temperature": POSITIVE, "skew": Interval(0, 1, "[)")},
)
def skew_kl(tokens: TokenLogits, *, temperature: float = 1.0, skew: float = 0.1) -> Tensor:
    """Return T^2 KL(p || a p + (1 - a) q) [n], with a = `skew`; a = 0 is KL(p || q)."""
    p, q = outcomes(tokens, temperature)
    return temperature**2 * _kl(p, _mixed(p, q, skew))


@LOSSES.add(
    "jsd",
    needs="logits",
    teachers=("dense", "top_k"),
    allowed={"temperature": POSITIVE, "beta": OPEN_UNIT},
)
def generalised_jsd(tokens: TokenLogits, *, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Return T^2 (b KL(p || m) + (1 - b) KL(q || m)) [n] with m = b p + (1 - b) q.

    Divided by b it goes to KL(p || q) as b goes to 0; divided by 1 - b, to KL(q || p) as b goes to 1.
    """
    p, q = outcomes(tokens, temperature)
    m = _mixed(p, q, beta)
    return temperature**2 * (beta * _kl(p, m) + (1 - beta) * _kl(q, m))


@LOSSES.add(
    "tvd",
    needs="logits",
    teachers=("dense", "top_k"),
    allowed={"temperature": POSITIVE},
)
def total_variation(tokens: TokenLogits, *, temperature: float = 1.0) -> Tensor:
    """Return T / 2 sum |p - q| [n], for T = 1 between 0 and 1; a number, not nats."""
    p, q = outcomes(tokens, temperature)
    return temperature / 2 * (p.exp() - q.exp()).abs().sum(dim=1)


def _kl(left: Tensor, right: Tensor) -> Tensor:
    """Return KL(left || right) [n] of log-probabilities [n, m]."""
    return (left.exp() * (left - right)).sum(dim=1)


def _mixed(p: Tensor, q: Tensor, share: float) -> Tensor:
    """Return the log of `share p + (1 - share) q` [n, m], for a share in [0, 1)."""
    return q if share == 0 else torch.logaddexp(p + math.log(share), q + math.log1p(-share))
