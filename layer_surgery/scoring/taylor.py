"""First-order Taylor importance of a layer's weights.

Ma et al., LLM-Pruner; Kim et al., Shortened LLaMA (layers).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from layer_surgery import parallel
from layer_surgery.scoring.context import SCORERS, Ranking, ScoringContext
from layer_surgery.walk.gradients import accumulated_gradients
from layer_surgery.walk.observer import Observer


class TaylorObserver(Observer):
    """Reduces each layer to `sum |W * dLoss/dW|` over the weights of its linears."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}
        self._sums = parallel.Sums()

    @contextmanager
    def watching(self, index: int, layer: nn.Module) -> Iterator[None]:
        weights = {name: p for name, p in layer.named_parameters() if p.dim() == 2}
        owner_of = parallel.owners({name: float(p.numel()) for name, p in weights.items()})
        self._sums = parallel.Sums(lambda name: (owner_of[name],))
        with accumulated_gradients(weights, self._sums) as gradients:
            yield
            values = {
                name: float((weights[name].detach() * gradients[name]).abs().sum(dtype=gradients[name].dtype))
                for name in parallel.own(owner_of)
            }
        self.values[index] = sum(parallel.by_owner(owner_of, values).values())

    def end_round(self, present: int) -> None:
        self._sums.close(present)


@SCORERS.add(
    "taylor",
    needs_data=True,
)
def taylor(context: ScoringContext) -> Ranking:
    """Return `sum |W * G|` per layer, with G the gradient of the summed loss; the least go first."""
    observer = TaylorObserver()
    context.walk.backpropagate([observer])
    values = [observer.values[index] for index in context.path]
    unit = context.unit.partition(" per ")[0]
    return Ranking(f"sum of |weight x gradient| ({unit}, first order)", values)
