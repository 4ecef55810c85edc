"""The vectors that an embedding model gives for texts."""

import torch
from torch import Tensor

from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError
from layer_surgery.walk.finite import remedy
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import Walk, WalkSettings


def text_vectors(model: StreamedModel, tokens: PackedTokens, settings: WalkSettings) -> Tensor:
    """Return the embedding of every text, [N, E] float64; one layer of the model is in memory at a time.

    Raises `NumericalError` for a vector that is not finite, or of length 0, which has no direction.
    """
    with Walk(model, tokens, settings) as walk:
        vectors = walk.embeddings(walk.forward(range(model.layer_count), keep=False))
    bad = ~torch.isfinite(vectors).all(dim=1) | (vectors == 0).all(dim=1)
    if bad.any():
        raise NumericalError(
            f"the embeddings that {model.checkpoint.name} gives for {int(bad.sum())} of {len(bad)} texts of "
            f"'{tokens.name}' are not finite or 0 (the first is text {int(bad.nonzero()[0]) + 1}); "
            f"{remedy(model.dtype)}."
        )
    return vectors
