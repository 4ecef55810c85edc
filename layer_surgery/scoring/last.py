"""The deepest layers first: looks at no data, as the scorer `random`."""

from layer_surgery.scoring.context import SCORERS, Ranking, ScoringContext


@SCORERS.add("last", parts=True)
def deepest_first(context: ScoringContext) -> Ranking:
    """Return the distance from the end; the final layer, which prepares the output, goes last of all."""
    count = context.layer_count
    values = [float(count - index) for index in range(count - 1)] + [float(count + 1)]
    return Ranking("layers from the end", values)
