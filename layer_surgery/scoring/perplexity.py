"""Greedy removal by loss: take away the layer whose absence costs least, and repeat.

Song et al., SLEB; Kim et al., Shortened LLaMA (perplexity).
"""

from layer_surgery.scoring.context import SCORERS, Ranking, ScoringContext
from layer_surgery.walk.boundaries import Boundary


@SCORERS.add(
    "perplexity",
    needs_data=True,
    depends_on=("count",),
)
def rise_without_each(context: ScoringContext) -> Ranking:
    """Return the rise of the mean loss when each layer alone is removed; the order is greedy.

    The boundaries of the current model are cached, so that only the layers after a cut are recomputed.
    """
    walk, path = context.walk, context.path
    original_loss = walk.losses(walk.forward(path, keep=True)).mean
    rises, order = list[float](), list[int]()
    for _round in range(context.count or 1):
        walk.forward(path, keep=True)  # from the first change on
        losses = _losses_without_each(context, path)
        if not order:
            rises = [loss - original_loss for loss in losses]
        position = min(range(len(path)), key=lambda p: (losses[p], -p))
        order.append(path.pop(position))
    quantity = f"rise of the mean loss when this layer alone is removed ({context.unit})"
    return Ranking(quantity, rises, order if context.count else None)


def _losses_without_each(context: ScoringContext, path: list[int]) -> list[float]:
    """Return the mean loss of the current model with each position of `path` left out (nats per token)."""
    walk, losses = context.walk, []
    with walk.new_store() as store, walk.settings.progress("removing each layer in turn", len(path)) as advance:
        scratch = Boundary(store, 0)
        for position in range(len(path)):
            source = walk.boundary(position)
            for index in path[position + 1 :]:
                walk.step(index, source, scratch)
                source = scratch
            losses.append(walk.losses(source).mean)
            advance()
    return losses
