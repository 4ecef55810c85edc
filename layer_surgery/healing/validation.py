"""What a model that is whole in memory loses on text that is not trained on: what validation looks at."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from layer_surgery import parallel
from layer_surgery.data.objective import NO_LABEL
from layer_surgery.data.tokens import PackedTokens
from layer_surgery.errors import NumericalError
from layer_surgery.healing.body import Body
from layer_surgery.healing.outputs import token_outputs
from layer_surgery.walk.embedding import embedding_losses
from layer_surgery.walk.losses import losses as own_losses
from layer_surgery.walk.losses import targets
from layer_surgery.walk.walk import LOGITS_AT_A_TIME


@torch.no_grad()
def mean_loss(body: Body, text: str, tokens: PackedTokens, batch_size: int) -> float:
    """Return the mean of the head's own loss, per token with loss or per sequence; processes share out the batches.

    Raises `NumericalError`, which names the first layer with a state that is not finite.

    Args:
        text: what errors call it.
    """
    objective, group = tokens.objective, parallel.group()
    if objective.problem == "embedding":
        return _of_vectors(body, tokens, batch_size)
    chunk = max(1, LOGITS_AT_A_TIME // body.checkpoint.vocabulary_size)
    batches = [*tokens.batches(batch_size)]
    sums = dict[int, tuple[float, int]]()  # of each micro-batch of this process's
    for number in range(group.rank, len(batches), group.world):
        rows, total = batches[number], 0.0
        given, labels = tokens.inputs(rows), targets(tokens, rows).to(body.device)
        last = body.states(given)[body.last]
        if objective.of_sequences:
            found = own_losses(body.rehearsal.head(last, given), labels, objective)
            sums[number] = float(found.double().sum()), len(found)
            continue
        carries = labels != NO_LABEL
        hidden, chosen = last[carries], labels[carries]
        for start in range(0, len(hidden), chunk):
            logits = token_outputs(body.rehearsal, hidden[start : start + chunk])
            part = chosen[start : start + chunk]
            total += float(nn.functional.cross_entropy(logits, part, reduction="sum").double())
        sums[number] = total, len(chosen)
    every: list[Any] = sorted(each for of_one in parallel.gather([*sums.items()]) for each in of_one)
    whole, count = float(sum(part[0] for _, part in every)), int(sum(part[1] for _, part in every))
    if not math.isfinite(whole):  # found by all processes together
        bad = next(number for number, part in every if not math.isfinite(part[0]))
        where = body.where_not_finite(tokens.inputs(batches[bad]))
        raise NumericalError(f"the loss on the {text} text is not finite ({where} of the student)")
    return whole / max(1, count)


def _of_vectors(body: Body, tokens: PackedTokens, batch_size: int) -> float:
    """Return the mean loss of embeddings, all texts compared with each other; one process has them all."""
    return float(embedding_losses(embeddings(body, tokens, batch_size), targets(tokens, slice(None))).mean())


@torch.no_grad()
def embeddings(body: Body, tokens: PackedTokens, batch_size: int) -> torch.Tensor:
    """Return the vectors of all texts, [N, E] float64 on the CPU."""
    found = []
    for rows in tokens.batches(batch_size):
        given = tokens.inputs(rows)
        found.append(body.rehearsal.head(body.states(given)[body.last], given).double().cpu())
    return torch.cat(found)
