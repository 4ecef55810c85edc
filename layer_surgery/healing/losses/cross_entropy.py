"""Cross-entropy with the labels; looks at no teacher."""

from __future__ import annotations

from torch import Tensor, nn

from layer_surgery.healing.losses.inputs import TokenLogits
from layer_surgery.healing.losses.registry import LOSSES, Interval


@LOSSES.add(
    "ce",
    needs="labels",
    teachers=(),
    allowed={"smoothing": Interval(0, 1, "[)")},
)
def cross_entropy(tokens: TokenLogits, *, smoothing: float = 0.0) -> Tensor:
    """Return (1 - e) CE(label) + e CE(uniform distribution) [n] in nats, with e = `smoothing`."""
    return nn.functional.cross_entropy(tokens.student, tokens.labels, reduction="none", label_smoothing=smoothing)
