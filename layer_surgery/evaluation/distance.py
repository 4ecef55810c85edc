"""Distance of a model from the original on the same text: KL divergence and top-1 agreement of their next tokens.

The two models are never in memory together: each is walked by itself, and the hidden states after its last layer are
kept. Here only what follows the last layer of each is needed. Shapes: N windows, S tokens each, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layer_surgery import parallel
from layer_surgery.checkpoint.checkpoint import Checkpoint
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import CheckpointError, DataError, NumericalError
from layer_surgery.evaluation.uncertainty import mean_per_token
from layer_surgery.records import KlDivergence, Top1Agreement
from layer_surgery.walk.boundaries import Boundary
from layer_surgery.walk.losses import next_tokens
from layer_surgery.walk.rehearsal import Rehearsal, blocks
from layer_surgery.walk.share import share_of
from layer_surgery.walk.streamed import StreamedModel
from layer_surgery.walk.walk import WalkSettings

#: Logits of one model exist for at most this many elements at a time (64 MiB in float32), and what is computed from
#: them in float64 for at most as many as below (16 MiB; about five such tensors).
LOGITS_AT_A_TIME = 1 << 24
_EXACT_AT_A_TIME = 1 << 21


@dataclass(frozen=True)
class FinalStates:
    """A model (its outer weights will do) and the hidden states [N, S, D] after its last layer."""

    model: StreamedModel
    hidden: Boundary


@torch.no_grad()
def distance(
    before: FinalStates, after: FinalStates, tokens: PackedTokens, settings: WalkSettings
) -> tuple[KlDivergence, Top1Agreement]:
    """Return KL(before || after) in nats and the top-1 agreement, over the predicted tokens of all windows.

    In float64 from the logits on, so that small divergences are no rounding. Exact percentiles: one float32 is kept
    for each token. Raises `CheckpointError` if the vocabularies differ and `NumericalError` if a value is not finite.
    """
    check_same_vocabulary(before.model.checkpoint, after.model.checkpoint)
    if not tokens.predicted_tokens:
        raise DataError(f"'{tokens.name}' has no token to predict.")
    heads = (Rehearsal(before.model), Rehearsal(after.model))
    share = share_of(tokens, settings.batch_size)
    own = share.tokens
    counted = next_tokens(own, slice(0, own.sequences)) != NO_LABEL
    divergence = torch.zeros(own.loss_mask.shape)
    agrees = torch.zeros_like(own.loss_mask)
    with settings.progress("distance", own.sequences) as advance:
        for rows, _present in share.rounds:
            if rows is None:
                continue
            hidden = (before.hidden.read(rows), after.hidden.read(rows))
            for block in blocks(counted[rows].shape, LOGITS_AT_A_TIME // before.model.vocabulary_size):
                if not counted[rows][block].any():
                    continue
                logits = [head.head(states[block]) for head, states in zip(heads, hidden, strict=True)]
                divergence[rows][block] = kl_divergence(*logits).float().cpu()
                agrees[rows][block] = (logits[0].argmax(dim=-1) == logits[1].argmax(dim=-1)).cpu()
            for _ in range(rows.stop - rows.start):
                advance()
    divergence, agrees, counted = (
        parallel.rows_of_all(found, share.windows, tokens.sequences) for found in (divergence, agrees, counted)
    )
    return _summarise(divergence, agrees, counted, tokens.name)


def kl_divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(softmax(before) || softmax(after)) of logits [..., V], as [...] float64 in nats, never below 0."""
    before, after = before.unsqueeze(0), after.unsqueeze(0)  # there may be no other dimension
    left, right = before.flatten(end_dim=-2), after.flatten(end_dim=-2)
    step = max(1, _EXACT_AT_A_TIME // left.shape[-1])
    pieces = []
    for start in range(0, len(left), step):
        p = left[start : start + step].double().log_softmax(dim=-1)
        q = right[start : start + step].double().log_softmax(dim=-1)
        # A token that `before` excludes (logit -inf) contributes nothing.
        pieces.append(torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(dim=-1))
    return torch.cat(pieces).clamp_min(0).view(before.shape[1:-1])


def check_same_vocabulary(before: Checkpoint, after: Checkpoint) -> None:
    """Raise `CheckpointError` if distributions over the vocabularies of the two models cannot be compared."""
    sizes = before.vocabulary_size, after.vocabulary_size
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{before.name} has a vocabulary of {sizes[0]} tokens and {after.name} one of {sizes[1]}, so their "
            "predictions cannot be compared; pass --no-distance."
        )


def _summarise(divergence: Tensor, agrees: Tensor, counted: Tensor, name: str) -> tuple[KlDivergence, Top1Agreement]:
    values: np.ndarray = divergence[counted].numpy()
    if not np.isfinite(values).all():
        raise NumericalError(
            f"the KL divergence on '{name}' is not finite for {int((~np.isfinite(values)).sum())} tokens."
        )
    counts, total = counted.sum(dim=1), int(counted.sum())
    mean, stderr = mean_per_token((divergence.double() * counted).sum(dim=1), counts)
    agreement, agreement_stderr = mean_per_token((agrees & counted).sum(dim=1).double(), counts)
    return (
        KlDivergence(
            mean=mean,
            stderr=stderr,
            p99_9=float(np.percentile(values, 99.9)),
            maximum=float(values.max()),
            tokens=total,
        ),
        Top1Agreement(value=agreement, stderr=agreement_stderr, tokens=total),
    )
