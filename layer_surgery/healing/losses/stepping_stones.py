"""Block-wise logit distillation: models between student and teacher, each compared with the teacher.

Decoupling Dark Knowledge via Block-wise Logit Distillation for Feature-level Alignment: a stone N_i has the first i
blocks of the student and the rest of the teacher's. The early blocks get a gradient through the teacher's own later
ones, and N_n is the student itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layer_surgery.healing.losses.divergences import forward_kl
from layer_surgery.healing.losses.inputs import Stones, TokenLogits
from layer_surgery.healing.losses.registry import LOSSES, POSITIVE, Arranged, Interval


@LOSSES.add(
    "stones",
    needs="stones",
    teachers=("dense", "top_k", "sampled"),
    allowed={"temperature": POSITIVE},
    arranged={"blocks": Arranged(4.0, Interval(1, whole=True))},
)
def stepping_stones(stones: Stones, *, temperature: float = 1.0) -> Tensor:
    """Return sum over i of `KL(teacher || N_i) / 2^(n - i)` [n tokens]: the student counts once, each earlier stone
    half as much as the next.

    Stones before the first block that surgery has changed are the teacher itself: leave them out. The option `blocks`
    says how many there are at most (`SteppingStones`); the paper has one for each stage of its networks.
    """
    count = len(stones.students)
    if not count:
        raise ValueError("there must be one stone at least, the student itself")
    total = torch.zeros_like(stones.students[-1][:, 0])
    for number, logits in enumerate(stones.students, 1):
        # A divergence from the teacher looks at no labels.
        tokens = TokenLogits(logits, stones.teacher, torch.zeros_like(logits[:, 0], dtype=torch.int64))
        total = total + forward_kl(tokens, temperature=temperature) / 2 ** (count - number)
    return total
