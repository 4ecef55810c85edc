"""The vectors that an embedding model gives for texts, and how near they are to those of the original.

Shapes: N texts of up to S tokens, E numbers of a vector.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError
from layer_surgery.records import TaskMetric, TaskResult
from layer_surgery.walk.embedding import embedding_losses
from layer_surgery.walk.finite import remedy
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk, WalkSettings

#: Tokens below which texts are not sorted by length any more: a further walk reads every layer again.
_SHORT = 16


def text_vectors(model: StreamedModel, tokens: PackedTokens, settings: WalkSettings) -> Tensor:
    """Return the embedding of every text, [N, E] float64; one layer of the model is in memory at a time.

    Texts of about one length are walked over together, for padding costs as much as text.
    Raises `NumericalError` for a vector that is not finite, or of length 0, which has no direction.
    """
    parts, order = [], []
    for rows, length in alike_in_length(tokens.valid.sum(dim=1), settings.batch_size):
        with Walk(model, tokens.select(rows).first_tokens(length), settings) as walk:
            parts.append(walk.embeddings(walk.forward(range(model.layer_count), keep=False)))
        order.append(rows)
    vectors = torch.cat(parts)[torch.cat(order).argsort()]
    bad = ~torch.isfinite(vectors).all(dim=1) | (vectors == 0).all(dim=1)
    if bad.any():
        raise NumericalError(
            f"the embeddings that {model.checkpoint.name} gives for {int(bad.sum())} of {len(bad)} texts of "
            f"'{tokens.name}' are not finite or 0 (the first is text {int(bad.nonzero()[0]) + 1}); "
            f"{remedy(model.dtype)}."
        )
    return vectors


def alike_in_length(lengths: Tensor, fewest: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the numbers of texts [n] int64 that go together, and the tokens of the longest; longest texts first.

    The longest text of a group has at most about twice the tokens of its shortest, but where the group would have less
    than `fewest` texts, and among the shortest texts, which are one group. `lengths` is [N] int64.
    """
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    start = 0
    while start < len(sizes):
        longest = sizes[start]
        stop = next(
            (
                place
                for place in range(min(start + fewest, len(sizes)), len(sizes))
                if longest > _SHORT and 2 * sizes[place] <= longest
            ),
            len(sizes),
        )
        yield order[start:stop], longest
        start = stop


def nearness(vectors: Tensor, original: Tensor) -> TaskResult:
    """Return the loss and the mean cosine with the original's vectors, both [N, E], each with its standard error.

    With fewer dimensions than the original there is no cosine between the two, and the loss is that of similarities
    alone.
    """
    found = {"loss": embedding_losses(vectors, original)}
    if vectors.shape == original.shape:
        found["cosine"] = torch.nn.functional.cosine_similarity(vectors, original, dim=-1)
    count = len(vectors)
    return TaskResult(
        metrics={
            name: TaskMetric(
                value=float(each.mean()),
                stderr=float(each.std() / count**0.5) if count > 1 else None,
                higher_is_better=name == "cosine",
            )
            for name, each in found.items()
        },
        items=count,
        num_fewshot=None,
        version="",
    )
