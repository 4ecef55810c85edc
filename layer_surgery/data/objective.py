"""What a model's head is trained to do, as far as data and losses have to know."""

from dataclasses import dataclass
from typing import Literal

#: Label of a position that carries no loss.
NO_LABEL = -100

Problem = Literal["next_token", "masked_token", "tags", "single_label", "multi_label", "regression", "embedding"]
#: Problems with one answer for a whole sequence.
_OF_SEQUENCES = ("single_label", "multi_label", "regression", "embedding")
_UNITS: dict[Problem, str] = {
    "next_token": "nats per token",
    "masked_token": "nats per masked token",
    "tags": "nats per tag",
    "single_label": "nats per example",
    "multi_label": "nats per example",
    "regression": "squared error per example",
    "embedding": "embedding loss per text",
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The problem that a head solves: it decides what is read of data, how it is packed, and the loss."""

    problem: Problem
    labels: tuple[str, ...] = ()  #: Names of the labels, or of the numbers of a regression, in the head's order.
    padding_id: int | None = None  #: Token that the model takes for padding; None where its configuration names none.
    longest: int | None = None  #: Most tokens that the model takes; None where its configuration does not say.
    prompt: str = ""  #: What stands before every text that is embedded.

    @property
    def of_sequences(self) -> bool:
        """Whether there is one answer for a whole sequence, and not one for each token."""
        return self.problem in _OF_SEQUENCES

    @property
    def labelled(self) -> bool:
        """Whether labels come with the data; else they are made from the text."""
        return self.problem not in ("next_token", "masked_token", "embedding")

    @property
    def apart(self) -> bool:
        """Whether sequences are examples or texts by themselves, each as long as it is; else text fills them."""
        return self.labelled or self.problem == "embedding"

    @property
    def unit(self) -> str:
        """Unit of the mean loss."""
        return _UNITS[self.problem]


NEXT_TOKEN = Objective(problem="next_token")
