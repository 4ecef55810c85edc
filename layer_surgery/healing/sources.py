"""Where a student reads what its teacher says: from disk, where it was asked before, or from one that runs beside it.

Shapes: B windows of S tokens, D hidden.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from layer_surgery.healing.outputs import TeacherAnswers


class TeacherOutputs(Protocol):
    """What the teacher says of the windows that are trained on."""

    def read(self, windows: Tensor) -> TeacherAnswers:
        """Return what it says of the items with loss of some windows [B] int64, in their order."""
        ...


class TeacherStates(Protocol):
    """Hidden states of the teacher in the windows that are trained on."""

    def read(self, pair: int, windows: Tensor) -> Tensor:
        """Return the states [B, S, D] after the teacher's layer of a pair."""
        ...


class TeacherProjections(Protocol):
    """Queries, keys and values of the teacher's last layer in the windows that are trained on."""

    def read(self, windows: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each [B, S, its width], of some windows [B] int64."""
        ...
